// What cublas.py calls, on the host's memory: the same functions, the same column-major matrices, the same types.
//
// It is there so that every argument of those calls is tested without a GPU, and not to be fast.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"

#define CUBLAS extern "C" __attribute__((visibility("default"))) int
enum { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };  // cublasStatus_t
enum { FLOAT = 0, DOUBLE = 1, HALF = 2, BFLOAT16 = 14 };      // cudaDataType
enum { COMPUTE_FLOAT = 68, COMPUTE_DOUBLE = 70, COMPUTE_TF32 = 77 };

struct Bfloat16 {
    uint16_t bits;
    explicit Bfloat16(float v) : bits(bfloat16_bits(v)) {}
    operator float() const { return float_of_bfloat16(bits); }
};

CUBLAS cublasCreate_v2(void** handle) {
    *handle = new int(0);
    return SUCCESS;
}
CUBLAS cublasDestroy_v2(void* handle) {
    delete (int*)handle;
    return SUCCESS;
}
CUBLAS cublasSetStream_v2(void*, void*) { return SUCCESS; }
CUBLAS cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }

// A number as TF32 has it: 10 binary places, rounded to nearest.
static float rounded(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x1000) & ~0x1fffu;
    memcpy(&x, &bits, 4);
    return x;
}

// The matrix op(x), column after column, in the type that is computed in.
template <typename Number, typename Sum>
static std::vector<Sum> packed(const Number* x, int ld, bool transposed, int rows, int columns, bool tf32) {
    std::vector<Sum> out((size_t)rows * columns);
    for (int c = 0; c < columns; c++)
        for (int r = 0; r < rows; r++)
            out[(size_t)c * rows + r] = (Sum)(transposed ? x[(size_t)r * ld + c] : x[(size_t)c * ld + r]);
    if (tf32)
        for (Sum& number : out) number = (Sum)rounded((float)number);
    return out;
}

template <typename Number, typename Sum>
static void product(bool ta, bool tb, int m, int n, int k, Sum alpha, const Number* a, int lda, const Number* b, int ldb,
                    Sum beta, Number* c, int ldc, bool tf32 = false) {
    const auto left = packed<Number, Sum>(a, lda, ta, m, k, tf32), right = packed<Number, Sum>(b, ldb, tb, k, n, tf32);
    std::vector<Sum> column(m);
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) column[i] = 0;
        for (int l = 0; l < k; l++) {
            const Sum factor = right[(size_t)j * k + l];
            const Sum* from = &left[(size_t)l * m];
            for (int i = 0; i < m; i++) column[i] += from[i] * factor;
        }
        Number* to = c + (size_t)j * ldc;
        for (int i = 0; i < m; i++) to[i] = (Number)(alpha * column[i] + (beta == 0 ? (Sum)0 : beta * (Sum)to[i]));
    }
}

CUBLAS cublasGemmStridedBatchedEx(void*, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int atype,
                                  int lda, long long astride, const void* b, int btype, int ldb, long long bstride,
                                  const void* beta, void* c, int ctype, int ldc, long long cstride, int count,
                                  int compute, int) {
    if (m < 1 || n < 1 || k < 1 || lda < (ta ? k : m) || ldb < (tb ? n : k) || ldc < m) return INVALID_VALUE;
    if (atype != btype || atype != ctype || (compute == COMPUTE_DOUBLE) != (atype == DOUBLE)) return NOT_SUPPORTED;
    for (int i = 0; i < count; i++) {
        const size_t fa = i * astride, fb = i * bstride, fc = i * cstride;
        if (atype == DOUBLE)
            product(ta, tb, m, n, k, *(double*)alpha, (double*)a + fa, lda, (double*)b + fb, ldb, *(double*)beta,
                    (double*)c + fc, ldc);
        else if (atype == HALF)
            product(ta, tb, m, n, k, *(float*)alpha, (_Float16*)a + fa, lda, (_Float16*)b + fb, ldb, *(float*)beta,
                    (_Float16*)c + fc, ldc);
        else if (atype == BFLOAT16)
            product(ta, tb, m, n, k, *(float*)alpha, (Bfloat16*)a + fa, lda, (Bfloat16*)b + fb, ldb, *(float*)beta,
                    (Bfloat16*)c + fc, ldc);
        else
            product(ta, tb, m, n, k, *(float*)alpha, (float*)a + fa, lda, (float*)b + fb, ldb, *(float*)beta,
                    (float*)c + fc, ldc, compute == COMPUTE_TF32);
    }
    return SUCCESS;
}
