/* Float32 numbers as many at a time as a register of the processor holds, and the exponential function. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
#else
enum { LANES = 8 };
typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
#endif

static inline floats load(const float *at) {
    floats x;
    memcpy(&x, at, sizeof x);
    return x;
}

static inline void store(float *at, floats x) { memcpy(at, &x, sizeof x); }

/* The sum of all lanes, pair by pair: one after the other would be a chain of waits. */
static inline float sum(floats x) {
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) y[i] += y[i + width];
    return y[0];
}

/* The larger number of each pair; `x` where it is none. Compilers make no one instruction of the comparison. */
static inline floats larger(floats x, floats y) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)y, (__m512)x);
#elif defined(__AVX__)
    return (floats)_mm256_max_ps((__m256)y, (__m256)x);
#else
    const words is_less = (words)(x < y);
    return (floats)(((words)y & is_less) | ((words)x & ~is_less));
#endif
}

/* The largest of all lanes. */
static inline float largest(floats x) {
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) y[i] = y[i] < y[i + width] ? y[i + width] : y[i];
    return y[0];
}

#define LOG2_E 1.44269504f

/* e to the x, within 2e-7 of it, for x up to 88: the polynomial of Cephes. Below -87 it is e to the -87; a NaN stays
   one. */
static inline floats power(floats x) {
    const floats low = (floats){0} - 87;
    x = larger(x, low);
    const floats shifted = x * LOG2_E + 12582912; /* 1.5 * 2^23: what is below 1 is rounded off */
    const floats n = shifted - 12582912;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + (r + 1);
    const words two = ((words)shifted << 23) + (127 << 23); /* 2 to the n */
    return y * (floats)two;
}

/* 2 to the x, within 2e-7 of it, for x up to 126: the polynomial of Cephes. Below -126 it is 2 to the -126; a NaN stays
   one. There is nothing to reduce by, unlike in `power`. */
static inline floats power_of_two(floats x) {
    const floats low = (floats){0} - 126;
    x = larger(x, low);
    const floats shifted = x + 12582912; /* 1.5 * 2^23: what is below 1 is rounded off */
    const floats r = x - (shifted - 12582912);
    floats y = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    y = y * r + 9.618437357674640e-3f;
    y = y * r + 5.550332471162809e-2f;
    y = y * r + 2.402264791363012e-1f;
    y = y * r + 6.931472028550421e-1f;
    y = y * r + 1;
    const words two = ((words)shifted << 23) + (127 << 23); /* 2 to the x rounded */
    return y * (floats)two;
}
