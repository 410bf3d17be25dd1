"""Writes htdemucs_tiny.npz: small models and what the original makes of them. Runs in the oracle's environment.

    $MLX_XFORMER_TORCH_PYTHON tests/golden/make_htdemucs_golden.py

Names: MODEL/state/NAME (float16, demucs' names), MODEL/mix (B, C, N), MODEL/output and MODEL/tap/NAME (PyTorch in
float64, rounded to float32), apply/CASE (PyTorch float32). Outputs are thinned by samples.track, taps by samples.thin.
Read with samples.read_packed. The apply cases use the models small0 and small1; the JSON beside says how.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "oracle"))

import operations  # noqa: E402
from samples import music, pack, thin, track  # noqa: E402

BASE = {  # the released structure: two branches that meet in the transformer only
    "sources": ["drums", "bass"],
    "channels": 2,
    "nfft": 2048,
    "multi_freqs": [],
    "dconv_mode": 3,
    "dconv_comp": 2,
    "bottom_channels": 12,
    "t_layers": 3,
    "t_heads": 2,
    "t_hidden_scale": 2.0,
    "samplerate": 4000,
    "segment": {"_type": "fraction", "numerator": 3, "denominator": 4},
}
MERGED = {  # the time branch ends inside; as many options as fit off their defaults
    "sources": ["a", "b", "c"],
    "audio_channels": 1,
    "channels": 2,
    "nfft": 1024,
    "multi_freqs": [],
    "freq_emb": 0.1,
    "emb_scale": 7,
    "context": 0,
    "context_enc": 1,
    "norm_starts": 1,
    "norm_groups": 2,
    "dconv_mode": 2,
    "dconv_depth": 3,
    "dconv_comp": 2,
    "t_layers": 2,
    "t_emb": "scaled",
    "t_max_positions": 41,
    "t_hidden_scale": 1.5,
    "t_heads": 4,
    "t_norm_in": False,
    "t_norm_in_group": True,
    "t_group_norm": True,
    "t_max_period": 500.0,
    "t_gelu": False,
    "t_weight_pos_embed": 0.7,
    "t_cross_first": True,
    "samplerate": 8000,
    "segment": 0.5,
}
FLAT = {  # one layer beyond the merge: plain convolutions over time, no transformer
    "sources": ["a", "b"],
    "channels": 2,
    "nfft": 256,
    "multi_freqs": [],
    "rewrite": False,
    "freq_emb": 0,
    "dconv_mode": 1,
    "dconv_comp": 1,
    "t_layers": 0,
    "samplerate": 1000,
    "segment": 0.9,
}
SMALL = {  # for whole tracks: 1009 samples a segment
    "sources": ["a", "b"],
    "channels": 4,
    "depth": 2,
    "nfft": 256,
    "multi_freqs": [],
    "dconv_mode": 3,
    "dconv_comp": 2,
    "t_layers": 2,
    "t_heads": 2,
    "t_hidden_scale": 2.0,
    "samplerate": 1009,
    "segment": 1,
}
MODELS = {"base": (BASE, 3), "merged": (MERGED, 4), "flat": (FLAT, 5), "small0": (SMALL, 6), "small1": (SMALL, 7)}
BATCH = {"flat": 2}
SHORT = {"merged": 3001}  # a length below the segment (4000)
BAG = [[1.0, 0.25], [0.5, 2.0]]
PLAIN = {
    "length": 2500,
    "shifts": 0,
    "overlap": 0.25,
    "transition_power": 1.0,
    "seed": 0,
    "gain": 1.0,
    "offset": 0.0,
    "bag": False,
}
APPLY = {
    "tiny": {"length": 300},
    "one": {"length": 1009},
    "one_and_1": {"length": 1010},
    "three": {"length": 3 * 1009 + 123},
    "overlap_10": {"overlap": 0.1},
    "overlap_50": {"overlap": 0.5, "transition_power": 2.0},
    "segment": {"segment": 0.6},
    "shift": {"shifts": 1, "seed": 11},
    "shifts": {"shifts": 2, "seed": 12, "length": 1500},
    "bag": {"bag": True},
    "bag_shifts": {"bag": True, "shifts": 2, "seed": 13, "length": 1200},
    "quiet": {"gain": 10 ** (-70 / 20) / 0.1, "length": 1500},
    "offset": {"offset": 0.3, "length": 1500},
}


def snr(x: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(truth**2) / np.sum((truth - x) ** 2)))


def forward(name: str, arrays: dict, notes: dict) -> None:
    kwargs, seed = MODELS[name]
    request = {
        "arrays": {},
        "kwargs": kwargs,
        "seed": seed,
        "signal_seed": seed,
        "length": SHORT.get(name),
        "half": True,
        "taps": True,
        "state": True,
        "batch": BATCH.get(name, 1),
    }
    _, single = operations.htdemucs(dtype="float32", **request)
    _, double = operations.htdemucs(dtype="float64", **request)
    for key, value in double.items():
        if key.startswith("state/"):
            arrays[f"{name}/{key}"] = value.astype(np.float16)
        elif key.startswith("tap/"):
            arrays[f"{name}/{key}"] = thin(value).astype(np.float32)
    arrays[f"{name}/mix"] = double["mix"]
    arrays[f"{name}/output"] = track(double["output"]).astype(np.float32)
    parameters = sum(value.size for key, value in double.items() if key.startswith("state/"))
    notes[name] = {
        "kwargs": kwargs,
        "seed": seed,
        "parameters": parameters,
        "float32_snr_db": round(snr(single["output"], double["output"]), 1),
    }


def apply(name: str, arrays: dict, notes: dict) -> None:
    case = {**PLAIN, **APPLY[name]}
    mix = music(case["length"], 2, 1, 1009) * np.float32(case["gain"]) + np.float32(case["offset"])
    options = {key: case[key] for key in ("shifts", "overlap", "transition_power")}
    bag = case["bag"]
    _, answer = operations.apply(
        arrays={"mix": mix},
        models=[SMALL, SMALL] if bag else [SMALL],
        seeds=[6, 7] if bag else [6],
        weights=BAG if bag else None,
        bag=bag,
        bag_segment=None,
        random_seed=case["seed"],
        half=True,
        state=False,
        normalise=True,
        options={**options, "segment": case.get("segment")},
    )
    arrays[f"apply/{name}"] = track(answer["output"]).astype(np.float32)
    notes[name] = {**case, "weights": BAG} if bag else case


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, np.ndarray] = {}
    models: dict[str, dict] = {}
    cases: dict[str, dict] = {}
    for name in MODELS:
        forward(name, arrays, models)
    for name in APPLY:
        apply(name, arrays, cases)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **pack(arrays))
    (HERE / "htdemucs_tiny.npz").write_bytes(buffer.getvalue())
    versions, _ = operations.versions({})
    notes = {
        "made_by": "tests/golden/make_htdemucs_golden.py",
        "versions": versions,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "bytes": len(buffer.getvalue()),
        "models": models,
        "apply_signal": "samples.music(length, 2, 1, 1009) * gain + offset",
        "apply": cases,
    }
    (HERE / "htdemucs_tiny.json").write_text(json.dumps(notes, indent=1) + "\n")


if __name__ == "__main__":
    main()
