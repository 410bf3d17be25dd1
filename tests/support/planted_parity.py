"""The check of planted bugs that parity must find."""

CHECK = """
class Caught(BaseException):
    pass

def stop(row, ratio, place):
    if place.why:
        raise Caught(f"{row.name} {row.check}: seed {place.seed} sample {place.sample}, {place.what}: {place.why}")
    row.attempted, row.passed = row.attempted + 1, row.passed + 1

def found(operation):
    from mlx_xformer import parity
    from mlx_xformer.parity.report import Row
    Row.add = stop
    try:
        parity.run([operation], dtypes=["float32"], seeds=1)
    except Caught as caught:
        return str(caught)
"""
