/* cblas_sgemm of a single row or column, handed on to cblas_sgemv; all others to the cblas_sgemm of the same library.

   MLX asks for every float32 product as cblas_sgemm, and OpenBLAS copies the matrix first, however few rows meet it:
   four times the work of a product with one row. openblas.py compiles this file, loads it ahead of MLX, which takes the
   first cblas_sgemm that it finds, and tells it whom to ask. */

typedef void product_t(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc);
typedef void row_t(int order, int trans, int m, int n, float alpha, const float *a, int lda, const float *x, int incx,
                   float beta, float *y, int incy);

static product_t *product;
static row_t *row;

enum { ROW_MAJOR = 101, PLAIN = 111, TRANSPOSED = 112 };
enum { TERMS = 512, WIDTH = 1024 }; /* of a sum in sequence, and of the row that holds some */

void take_products_from(product_t *of_many, row_t *of_one)
{
    product = of_many;
    row = of_one;
}

/* y += alpha a^T x for a (k, n) in rows of lda. cblas_sgemv adds the k terms in sequence: here a few at a time, and
   then the sums, which keeps the rounding of long ones small. */
static void add_rows(int k, int n, float alpha, const float *a, int lda, const float *x, int incx, float *y, int incy)
{
    float part[WIDTH];
    if (k <= TERMS) {
        row(ROW_MAJOR, TRANSPOSED, k, n, alpha, a, lda, x, incx, 1, y, incy);
        return;
    }
    for (int left = 0; left < n; left += WIDTH) {
        int width = n - left < WIDTH ? n - left : WIDTH;
        for (int first = 0; first < k; first += TERMS) {
            int terms = k - first < TERMS ? k - first : TERMS;
            for (int i = 0; i < width; i++)
                part[i] = 0;
            row(ROW_MAJOR, TRANSPOSED, terms, width, alpha, a + (long)first * lda + left, lda, x + (long)first * incx,
                incx, 1, part, 1);
            for (int i = 0; i < width; i++)
                y[(long)(left + i) * incy] += part[i];
        }
    }
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc)
{
    int single = order == ROW_MAJOR && k > 0 && (beta == 0 || beta == 1) && (m == 1 || n == 1);
    if (!single) {
        product(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
        return;
    }
    int step = m == 1 ? 1 : ldc, count = m == 1 ? n : m;
    if (beta == 0) /* what is there may be NaN */
        for (int i = 0; i < count; i++)
            c[(long)i * step] = 0;
    if (m == 1) { /* a is (1, k), and b (k, n), or its transpose */
        int by = trans_a == PLAIN ? 1 : lda;
        if (trans_b == PLAIN)
            add_rows(k, n, alpha, b, ldb, a, by, c, step);
        else
            row(ROW_MAJOR, PLAIN, n, k, alpha, b, ldb, a, by, 1, c, step);
    } else { /* a is (m, k), or its transpose, and b (k, 1) */
        int by = trans_b == PLAIN ? ldb : 1;
        if (trans_a == PLAIN)
            row(ROW_MAJOR, PLAIN, m, k, alpha, a, lda, b, by, 1, c, step);
        else
            add_rows(k, m, alpha, a, lda, b, by, c, step);
    }
}
