/* Attention of decode steps over rows [keys | values] of all heads, in one streaming pass over each half.

   A task is a sequence and a block of kv heads: of each row it reads one piece of keys and, later, one of values, both
   consecutive in memory. Pieces become float32 in a buffer that stays in the first cache. Compiled by
   engine/kernels/host_kernel.py, which calls `attend` from several threads; each takes the next task when it has done
   one. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

enum { FLOAT32, FLOAT16, BFLOAT16 };
enum { GROUP = 64, QUARTER = 16, BEND = 28, SCALE_BYTES = 2 }; /* as engine/kernels/codec.py has them */

static inline float of_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint16_t to_bfloat16(float x) { /* to nearest even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Compilers do not always make one instruction of what the processor has one for: of 16-bit floats, and of codes. */
#if defined(__F16C__)
static inline float of_float16(uint16_t x) { return _cvtsh_ss(x); }
static inline uint16_t to_float16(float x) { return _cvtss_sh(x, 0); }
#else
static inline float of_float16(uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, 2);
    return (float)y;
}
static inline uint16_t to_float16(float x) {
    const _Float16 y = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &y, 2);
    return bits;
}
#endif

static inline void of_float16s(const uint16_t *restrict from, int64_t count, float *restrict to) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + i))));
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < count; i++) to[i] = of_float16(from[i]);
}

/* Multiply a group by the Hadamard matrix and divide by 8. */
static inline void rotate(float *x) {
    for (int half = GROUP / 2; half; half /= 2)
        for (int first = 0; first < GROUP; first += 2 * half)
            for (int i = first; i < first + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
    for (int i = 0; i < GROUP; i++) x[i] /= 8;
}

/* What a code stands for, in units of its scale's multiple. */
static inline float level(float code, int bits) {
    const float odd = 2 * code - (float)((1 << bits) - 1);
    return bits == 4 ? odd * (BEND + __builtin_fabsf(odd)) : odd;
}

/* Behind the codes of a row of `width` numbers are the scales of its groups, then four multiples of each. */
static inline float scale_at(const char *row, int bits, int64_t width, int64_t group) {
    return of_bfloat16(((const uint16_t *)(row + width * bits / 8))[group]);
}

static inline float multiple_at(const char *row, int bits, int64_t width, int64_t group, int quarter) {
    const char *multiples = row + width * bits / 8 + width / GROUP * SCALE_BYTES;
    return (float)(((((const uint16_t *)multiples)[group] >> 4 * quarter) & 15) + 1);
}

/* Numbers [first, first + count) of a row of `width` numbers, as float32. Codes: both multiples of GROUP. */
static inline void piece(const char *restrict row, int type, int bits, int64_t width, int64_t first, int64_t count,
                         float *restrict to) {
    if (bits == 0) {
        if (type == FLOAT16) {
            of_float16s((const uint16_t *)row + first, count, to);
        } else if (type == BFLOAT16) {
            const uint16_t *from = (const uint16_t *)row + first;
            for (int64_t i = 0; i < count; i++) to[i] = of_bfloat16(from[i]);
        } else {
            memcpy(to, (const float *)row + first, 4 * count);
        }
        return;
    }
    for (int64_t g = first / GROUP; g < (first + count) / GROUP; g++, to += GROUP) {
        const uint8_t *codes = (const uint8_t *)row + g * GROUP * bits / 8;
        if (bits == 4) {
            for (int i = 0; i < GROUP / 2; i++) to[i] = (float)(codes[i] & 15);
            for (int i = 0; i < GROUP / 2; i++) to[i + GROUP / 2] = (float)(codes[i] >> 4);
        } else {
            for (int i = 0; i < GROUP; i++) to[i] = (float)codes[i];
        }
        for (int i = 0; i < GROUP; i++) to[i] = level(to[i], bits) * multiple_at(row, bits, width, g, i / QUARTER);
        rotate(to);
        const float scale = scale_at(row, bits, width, g);
        for (int i = 0; i < GROUP; i++) to[i] *= scale;
        if (type == FLOAT16)
            for (int i = 0; i < GROUP; i++) to[i] = of_float16(to_float16(to[i]));
        if (type == BFLOAT16)
            for (int i = 0; i < GROUP; i++) to[i] = of_bfloat16(to_bfloat16(to[i]));
    }
}

/* Sixteen numbers at a time, in the registers that there are. */
typedef float floats __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(64)));
enum { LANES = 16, ROWS = 4 };

/* The rows of a piece are farther apart than the processor looks ahead: ask for a line of those to come with each that
   is at work. Beyond the last row this asks for what nobody reads, which is allowed. */
static inline void ask_for(const char *at) { __builtin_prefetch(at); }

static inline floats load(const float *at) {
    floats x;
    memcpy(&x, at, sizeof x);
    return x;
}

static inline void store(float *at, floats x) { memcpy(at, &x, sizeof x); }

static inline floats numbers_at(const char *at, int type) {
    floats x;
    if (type == FLOAT32) return load((const float *)at);
    if (type == FLOAT16) {
        of_float16s((const uint16_t *)at, LANES, (float *)&x);
        return x;
    }
    halves h;
    memcpy(&h, at, sizeof h);
    words bits = __builtin_convertvector(h, words) << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* What the codes of a quarter of a group stand for, in units of the quarter's multiple: 16 lanes. */
static inline floats levels_at(const uint8_t *codes, int bits, int quarter) {
    bytes b;
    if (bits == 8) {
        memcpy(&b, codes + LANES * quarter, sizeof b);
    } else {
        memcpy(&b, codes + LANES * (quarter & 1), sizeof b);
        b = quarter < 2 ? b & 15 : b >> 4;
    }
    floats x;
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu8_epi32((__m128i)b);
    if (bits == 4) { /* a table of 16 numbers is one register */
        float table[LANES];
        for (int i = 0; i < LANES; i++) table[i] = level((float)i, 4);
        const __m512 found = _mm512_permutexvar_ps(wide, _mm512_loadu_ps(table));
        memcpy(&x, &found, sizeof x);
        return x;
    }
    const __m512 y = _mm512_cvtepi32_ps(wide);
    memcpy(&x, &y, sizeof x);
#elif defined(__AVX2__)
    const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)b));
    const __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)b, 8)));
    memcpy(&x, &low, sizeof low);
    memcpy((char *)&x + sizeof low, &high, sizeof high);
#else
    for (int i = 0; i < LANES; i++) x[i] = (float)b[i];
#endif
    x = 2 * x - (float)((1 << bits) - 1);
    return bits == 4 ? x * (BEND + (floats)((words)x & 0x7fffffff)) : x;
}

/* The sum of all lanes, pair by pair: one after the other would be a chain of sixteen waits. */
static inline float sum(floats x) {
    float y[LANES];
    memcpy(y, &x, sizeof y);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) y[i] += y[i + width];
    return y[0];
}

static inline float dot(const float *a, const float *b, int64_t n) {
    floats total = {0};
    float rest = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) total += load(a + i) * load(b + i);
    for (; i < n; i++) rest += a[i] * b[i];
    return sum(total) + rest;
}

/* The products of a query and a head's numbers [first, first + count) of `rows` (at most ROWS) consecutive rows.
   Where they are in codes, the query is rotated as they are. */
static inline void products(const char *row, int64_t row_bytes, int rows, int type, int bits, int64_t width,
                            int64_t first, int64_t count, const float *query, float *to) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    floats totals[ROWS] = {{0}};
    if (!bits) {
        for (int64_t i = 0; i < count; i += LANES) {
            const floats q = load(query + i);
            for (int r = 0; r < rows; r++) {
                const char *at = row + r * row_bytes + (first + i) * size;
                ask_for(at + ROWS * row_bytes);
                totals[r] += numbers_at(at, type) * q;
            }
        }
    } else {
        for (int64_t g = 0; g < count / GROUP; g++) {
            floats parts[ROWS] = {{0}};
            for (int r = 0; r < rows; r++) ask_for(row + (r + ROWS) * row_bytes + (first + g * GROUP) * bits / 8);
            for (int i = 0; i < GROUP / LANES; i++) {
                const floats q = load(query + g * GROUP + i * LANES);
                for (int r = 0; r < rows; r++) {
                    const char *at = row + r * row_bytes;
                    const uint8_t *codes = (const uint8_t *)at + (first + g * GROUP) * bits / 8;
                    parts[r] += levels_at(codes, bits, i) * q * multiple_at(at, bits, width, first / GROUP + g, i);
                }
            }
            for (int r = 0; r < rows; r++)
                totals[r] += parts[r] * scale_at(row + r * row_bytes, bits, width, first / GROUP + g);
        }
    }
    for (int r = 0; r < rows; r++) to[r] = sum(totals[r]);
}

/* Add numbers [first, first + count) of `rows` (at most ROWS) consecutive rows, each by its weight; those in codes as
   they are rotated. */
static inline void add(const char *row, int64_t row_bytes, int rows, int type, int bits, int64_t width, int64_t first,
                       int64_t count, const float *weights, float *to) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    if (!bits) {
        for (int64_t i = 0; i < count; i += LANES) {
            floats x = load(to + i);
            for (int r = 0; r < rows; r++) {
                const char *at = row + r * row_bytes + (first + i) * size;
                ask_for(at + ROWS * row_bytes);
                x += numbers_at(at, type) * weights[r];
            }
            store(to + i, x);
        }
        return;
    }
    for (int64_t g = 0; g < count / GROUP; g++) {
        float scales[ROWS];
        for (int r = 0; r < rows; r++) ask_for(row + (r + ROWS) * row_bytes + (first + g * GROUP) * bits / 8);
        for (int r = 0; r < rows; r++)
            scales[r] = weights[r] * scale_at(row + r * row_bytes, bits, width, first / GROUP + g);
        for (int i = 0; i < GROUP / LANES; i++) {
            floats x = load(to + g * GROUP + i * LANES);
            for (int r = 0; r < rows; r++) {
                const char *at = row + r * row_bytes;
                const uint8_t *codes = (const uint8_t *)at + (first + g * GROUP) * bits / 8;
                const float multiple = multiple_at(at, bits, width, first / GROUP + g, i);
                x += levels_at(codes, bits, i) * (scales[r] * multiple);
            }
            store(to + g * GROUP + i * LANES, x);
        }
    }
}

/* e to the x <= 0, within 2e-7 of it: the polynomial of Cephes, which compilers vectorize. */
static inline float power(float x) {
    x = x < -87 ? -87 : x;
    const float n = __builtin_floorf(x * 1.44269504f + 0.5f);
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1;
    const int32_t exponent = n > -127 ? (int32_t)n : -127; /* a NaN is no integer; y keeps it */
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return y * two;
}

/* Make `n` scores weights, each its part of 1; returns the sum of their exponentials, without that of the `highest`. */
static inline float softmax(float *row, int64_t n, float *highest) {
    float most[LANES], total[LANES] = {0}, all = 0;
    for (int i = 0; i < LANES; i++) most[i] = -INFINITY;
    int64_t l = 0;
    for (; l + LANES <= n; l += LANES)
        for (int i = 0; i < LANES; i++) most[i] = row[l + i] > most[i] ? row[l + i] : most[i];
    for (; l < n; l++) most[0] = row[l] > most[0] ? row[l] : most[0];
    for (int i = 1; i < LANES; i++) most[0] = most[i] > most[0] ? most[i] : most[0];
    for (l = 0; l < n; l++) row[l] = power(row[l] - most[0]);
    for (l = 0; l + LANES <= n; l += LANES)
        for (int i = 0; i < LANES; i++) total[i] += row[l + i];
    for (; l < n; l++) all += row[l];
    for (int i = 0; i < LANES; i++) all += total[i];
    const float part = 1 / all;
    for (l = 0; l < n; l++) row[l] *= part;
    *highest = most[0];
    return all;
}

static inline void put_numbers(const float *from, int64_t count, int type, char *to) {
    uint16_t *halves_of = (uint16_t *)to;
    if (type == FLOAT32) memcpy(to, from, 4 * count);
    if (type == FLOAT16)
        for (int64_t i = 0; i < count; i++) halves_of[i] = to_float16(from[i]);
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves_of[i] = to_bfloat16(from[i]);
}

struct work {
    const char *table;        /* first row */
    int64_t row_bytes;
    const int64_t *firsts;    /* [sequences], in rows */
    const int64_t *lengths;   /* [sequences], the new rows included */
    int64_t kv_heads, key_dim, value_dim;
    int64_t steps, copies;    /* new rows of each sequence; query heads that share keys and values */
    int64_t block, tasks;     /* kv heads of a task; tasks: sequences * blocks */
    int64_t type, bits;       /* of the numbers, queries and results too; of their codes, or 0 */
    const char *query;        /* [sequences, steps, kv heads, copies, key dim] */
    char *output;             /* [sequences, steps, kv heads, copies, value dim] */
    float *logsumexp;         /* [sequences, steps, kv heads, copies] */
    float scaling;            /* of queries */
    int64_t next;             /* task that nobody has taken yet */
};

/* The same for one query of each head, without the buffer: scores [heads, longest], sums [heads, value dim]. */
static void keys_of_one(const struct work *w, const char *table, int64_t at, int64_t heads, int64_t length,
                        const float *query, float *scores, int64_t longest) {
    const int64_t width = w->kv_heads * (w->key_dim + w->value_dim), dim = w->key_dim;
    for (int64_t l = 0; l < length; l += ROWS) {
        const char *row = table + l * w->row_bytes;
        const int rows = length - l < ROWS ? (int)(length - l) : ROWS;
        for (int64_t h = 0; h < heads; h++) {
            const float *q = query + h * dim;
            float *to = scores + h * longest + l;
            if (rows == ROWS) /* a constant, for the compiler */
                products(row, w->row_bytes, ROWS, w->type, w->bits, width, at + h * dim, dim, q, to);
            else
                products(row, w->row_bytes, rows, w->type, w->bits, width, at + h * dim, dim, q, to);
        }
    }
}

static void values_of_one(const struct work *w, const char *table, int64_t at, int64_t heads, int64_t length,
                          const float *scores, int64_t longest, float *sums) {
    const int64_t width = w->kv_heads * (w->key_dim + w->value_dim), dim = w->value_dim;
    for (int64_t l = 0; l < length; l += ROWS) {
        const char *row = table + l * w->row_bytes;
        const int rows = length - l < ROWS ? (int)(length - l) : ROWS;
        for (int64_t h = 0; h < heads; h++) {
            const float *weights = scores + h * longest + l;
            if (rows == ROWS) /* a constant, for the compiler */
                add(row, w->row_bytes, ROWS, w->type, w->bits, width, at + h * dim, dim, weights, sums + h * dim);
            else
                add(row, w->row_bytes, rows, w->type, w->bits, width, at + h * dim, dim, weights, sums + h * dim);
        }
    }
}

/* Tasks, until none is left; 0, or 1 if there is no memory. */
int attend(struct work *w) {
    const int64_t blocks = (w->kv_heads + w->block - 1) / w->block, rows = w->steps * w->copies;
    const int64_t width = w->kv_heads * (w->key_dim + w->value_dim), size = w->type == FLOAT32 ? 4 : 2;
    const int64_t dim = w->key_dim > w->value_dim ? w->key_dim : w->value_dim;
    const int64_t unit = w->bits ? GROUP : LANES; /* codes are taken by whole groups */
    const int is_single = rows == 1 && w->key_dim % unit == 0 && w->value_dim % unit == 0;
    int64_t longest = 0;
    for (int64_t s = 0; s < w->tasks / blocks; s++)
        if (w->lengths[s] > longest) longest = w->lengths[s];
    float *memory = malloc(4 * w->block * (dim + rows * (longest + w->key_dim + w->value_dim)) + 1);
    if (!memory) return 1;
    float *numbers = memory, *query = numbers + w->block * dim, *sums = query + w->block * rows * w->key_dim;
    float *scores = sums + w->block * rows * w->value_dim;
    for (int64_t task; (task = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->tasks;) {
        const int64_t sequence = task / blocks, head = task % blocks * w->block, length = w->lengths[sequence];
        const int64_t heads = w->kv_heads - head < w->block ? w->kv_heads - head : w->block;
        const char *table = w->table + w->firsts[sequence] * w->row_bytes;
        const int64_t key_at = head * w->key_dim, value_at = w->kv_heads * w->key_dim + head * w->value_dim;
/* Where a row of scores [longest] and one of queries or results is: of head h, step s, copy c. */
#define SCORES(h, s, c) (scores + (((h) * w->steps + (s)) * w->copies + (c)) * longest)
#define QUERY(h, s, c) (query + (((h) * w->steps + (s)) * w->copies + (c)) * w->key_dim)
#define SUMS(h, s, c) (sums + (((h) * w->steps + (s)) * w->copies + (c)) * w->value_dim)
#define ROW(h, s, c) (((sequence * w->steps + (s)) * w->kv_heads + head + (h)) * w->copies + (c))
        for (int64_t h = 0; h < heads; h++)
            for (int64_t s = 0; s < w->steps; s++) {
                float *to = QUERY(h, s, 0);
                piece(w->query, w->type, 0, 0, ROW(h, s, 0) * w->key_dim, w->copies * w->key_dim, to);
                for (int64_t i = 0; i < w->copies * w->key_dim; i++) to[i] *= w->scaling;
            }
        if (is_single && w->bits)
            for (int64_t i = 0; i < heads * w->key_dim; i += GROUP) rotate(query + i);
        if (is_single) keys_of_one(w, table, key_at, heads, length, query, scores, longest);
        for (int64_t l = 0; l < length && !is_single; l++) {
            piece(table + l * w->row_bytes, w->type, w->bits, width, key_at, heads * w->key_dim, numbers);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t s = 0; s < w->steps; s++)
                    for (int64_t c = 0; c < w->copies; c++)
                        SCORES(h, s, c)[l] = dot(QUERY(h, s, c), numbers + h * w->key_dim, w->key_dim);
        }
        for (int64_t h = 0; h < heads; h++)
            for (int64_t s = 0; s < w->steps; s++)
                for (int64_t c = 0; c < w->copies; c++) {
                    float *row = SCORES(h, s, c), highest = -INFINITY, total = 0;
                    const int64_t seen = length - w->steps + s + 1; /* a new token sees those up to itself */
                    total = softmax(row, seen, &highest);
                    for (int64_t l = seen; l < length; l++) row[l] = 0;
                    w->logsumexp[ROW(h, s, c)] = highest + logf(total);
                }
        memset(sums, 0, 4 * w->block * rows * w->value_dim);
        if (is_single) values_of_one(w, table, value_at, heads, length, scores, longest, sums);
        if (is_single && w->bits)
            for (int64_t i = 0; i < heads * w->value_dim; i += GROUP) rotate(sums + i);
        for (int64_t l = 0; l < length && !is_single; l++) {
            piece(table + l * w->row_bytes, w->type, w->bits, width, value_at, heads * w->value_dim, numbers);
            for (int64_t h = 0; h < heads; h++)
                for (int64_t s = 0; s < w->steps; s++)
                    for (int64_t c = 0; c < w->copies; c++) {
                        const float weight = SCORES(h, s, c)[l];
                        const float *restrict from = numbers + h * w->value_dim;
                        float *restrict to = SUMS(h, s, c);
                        for (int64_t i = 0; i < w->value_dim; i++) to[i] += weight * from[i];
                    }
        }
        for (int64_t h = 0; h < heads; h++)
            for (int64_t s = 0; s < w->steps; s++)
                for (int64_t c = 0; c < w->copies; c++)
                    put_numbers(SUMS(h, s, c), w->value_dim, w->type, w->output + ROW(h, s, c) * w->value_dim * size);
    }
    free(memory);
    return 0;
}
