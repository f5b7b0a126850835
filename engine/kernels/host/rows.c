/* What layers do with rows between matrices, in float32 and in one pass each: norms, rotations, gated products.

   Threads take some rows at a time until none is left. */

#include "numbers.h"

enum { SOME = 8 }; /* rows that a thread takes */

enum { SILU, GELU, GELU_TANH }; /* as `Activation` counts them */

struct gates { /* rows [rows, width], as far apart as strides say; output is dense */
    const float *gate, *up;
    float *output;
    int64_t rows, width, gate_row, up_row, activation, next;
};

struct norms {
    const float *rows, *weight;
    float *output;
    int64_t count, width;
    float eps, plus; /* what is added to the mean of squares, and to the weight */
    int64_t next;
};

struct rotations { /* [rows, heads, dim] with strides for one of queries and keys; output is dense */
    const float *heads, *cosine, *sine;
    float *output;
    int64_t rows, count, dim, row, head, turned, table_row, per_pair, next;
};

static inline int64_t take(int64_t *next, int64_t rows, int64_t *end) {
    const int64_t first = __atomic_fetch_add(next, SOME, __ATOMIC_RELAXED);
    *end = first + SOME < rows ? first + SOME : rows;
    return first;
}

/* 1 / (1 + e to the -x); below -87 it is what it is there, about 1e-38. */
static inline floats sigmoid(floats x) { return 1 / (power(-larger(x, (floats){0} - 87)) + 1); }

static inline floats activated(floats x, int64_t activation) {
    if (activation == SILU) return x * sigmoid(x);
    return x * sigmoid(x * (x * x * 0.07135481283f + 1.5957691216f)); /* of twice what tanh is taken of */
}

void gate_rows(void *of) {
    struct gates *w = of;
    for (int64_t end, r; (r = take(&w->next, w->rows, &end)) < w->rows;)
        for (; r < end; r++) {
            const float *gate = w->gate + r * w->gate_row, *up = w->up + r * w->up_row;
            float *to = w->output + r * w->width;
            int64_t i = 0;
            for (; i + LANES <= w->width; i += LANES)
                store(to + i, activated(load(gate + i), w->activation) * load(up + i));
            for (; i < w->width; i++) to[i] = activated((floats){0} + gate[i], w->activation)[0] * up[i];
        }
}

void norm_rows(void *of) {
    struct norms *w = of;
    for (int64_t end, r; (r = take(&w->next, w->count, &end)) < w->count;)
        for (; r < end; r++) {
            const float *from = w->rows + r * w->width;
            float *to = w->output + r * w->width, rest = 0;
            floats squares[4] = {{0}};
            int64_t i = 0;
            for (; i + 4 * LANES <= w->width; i += 4 * LANES)
                for (int j = 0; j < 4; j++) {
                    const floats x = load(from + i + j * LANES);
                    squares[j] += x * x;
                }
            for (; i < w->width; i++) rest += from[i] * from[i];
            const float all = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
            const float factor = 1 / sqrtf(all / (float)w->width + w->eps);
            for (i = 0; i < w->width; i++) to[i] = from[i] * factor * (w->weight[i] + w->plus);
        }
}

void rotate_rows(void *of) {
    struct rotations *w = of;
    const int64_t half = w->turned / 2, second = w->per_pair == 2 ? half : 0; /* of the tables */
    for (int64_t end, r; (r = take(&w->next, w->rows, &end)) < w->rows;)
        for (; r < end; r++) {
            const float *restrict cosine = w->cosine + r * w->table_row, *restrict sine = w->sine + r * w->table_row;
            for (int64_t h = 0; h < w->count; h++) {
                const float *restrict from = w->heads + r * w->row + h * w->head;
                float *restrict to = w->output + (r * w->count + h) * w->dim;
                for (int64_t i = 0; i < half; i++) to[i] = from[i] * cosine[i] - from[i + half] * sine[i];
                for (int64_t i = 0; i < half; i++)
                    to[i + half] = from[i + half] * cosine[i + second] + from[i] * sine[i + second];
                for (int64_t i = w->turned; i < w->dim; i++) to[i] = from[i];
            }
        }
}
