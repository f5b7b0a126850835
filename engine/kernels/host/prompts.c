/* Attention of prompts in float32: rows of new spans against [prefix | own tokens up to themselves], by plain softmax.

   A task is a head of keys and values and some neighbouring rows that continue the same prefix. Query heads that share
   keys and values are further rows ("vectors"). Keys come in blocks: a block is copied into the order in which products
   read it, and all vectors of the task are multiplied with it while it is in the second cache. Each vector's softmax is
   corrected when a block has a higher score than those before it, so that scores are never kept. */

#include "numbers.h"

enum {
    LINE = 16,                          /* numbers of a line of the caches */
    AHEAD = 8,                          /* rows */
    KEYS = 128,                         /* in a block */
    VECTORS = 48,                       /* whose scores are at work at once */
    PANEL = 2 * LANES,                  /* numbers that a product makes of a vector at once */
    TILE = LANES == 16 ? 12 : 6,        /* vectors that it takes at once: with PANEL, about all registers */
};

struct keys { /* of a prefix, or of a span's own rows; strides in numbers */
    const float *key, *value;
    int64_t length, key_row, key_head, value_row, value_head;
};

struct span { /* rows [first, end) that attend to those of the same span up to themselves */
    int64_t first, end, own;
};

struct run { /* rows [first, end), those of spans [span, span_end), and the prefix that they attend to, or -1 */
    int64_t first, end, span, span_end, prefix;
};

struct work {
    const struct keys *keys;
    const struct span *spans;
    const struct run *runs;
    int64_t tasks, kv_heads, copies, key_dim, value_dim;
    const float *query;
    int64_t query_row, query_head; /* strides */
    float *output;                 /* [rows, heads, value dim] */
    float scaling;
    int64_t failed;
    int64_t next; /* task that nobody has taken yet */
};

/* What a thread works with. */
struct desk {
    float *query;  /* [vectors, key dim], scaled */
    float *sums;   /* [vectors, padded value dim] */
    float *most;   /* [vectors], the highest score so far */
    float *total;  /* [vectors], sum of exponentials so far */
    float *keys;   /* [KEYS / PANEL, key dim, PANEL] */
    float *values; /* [padded value dim / PANEL, KEYS, PANEL] */
    float *scores; /* [VECTORS, KEYS] */
    int64_t width; /* padded value dim */
};

/* `rows` vectors with `count` numbers each, `stride` apart, times [count, PANEL]: put, or added to what is there. */
static inline __attribute__((always_inline)) void product(int rows, const float *restrict left, int64_t stride,
                                                          const float *restrict right, int64_t count, int adds,
                                                          float *restrict to, int64_t to_stride) {
    floats a[TILE], b[TILE];
    for (int r = 0; r < rows; r++) {
        a[r] = adds ? load(to + r * to_stride) : (floats){0};
        b[r] = adds ? load(to + r * to_stride + LANES) : (floats){0};
    }
    for (int64_t i = 0; i < count; i++) {
        const floats x = load(right + i * PANEL), y = load(right + i * PANEL + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const float factor = left[r * stride + i];
            a[r] += factor * x;
            b[r] += factor * y;
        }
    }
    for (int r = 0; r < rows; r++) {
        store(to + r * to_stride, a[r]);
        store(to + r * to_stride + LANES, b[r]);
    }
}

/* The same for any number of vectors. */
static void products(int64_t vectors, const float *left, int64_t stride, const float *right, int64_t count, int adds,
                     float *to, int64_t to_stride) {
    int64_t v = 0;
    for (; v + TILE <= vectors; v += TILE) /* a constant, for the compiler */
        product(TILE, left + v * stride, stride, right, count, adds, to + v * to_stride, to_stride);
    for (; v + 2 <= vectors; v += 2)
        product(2, left + v * stride, stride, right, count, adds, to + v * to_stride, to_stride);
    if (v < vectors) product(1, left + v * stride, stride, right, count, adds, to + v * to_stride, to_stride);
}

/* Rows of a head are farther apart than the processor looks ahead: ask for those to come. Beyond the last one this asks
   for what nobody reads, which is allowed. */
static inline void ask_for(const float *row, int64_t count) {
    for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(row + i);
}

/* Keys and values [first, first + count) of a head, in the order of products; what is missing of a panel is 0. */
static void lay_out(const struct work *w, const struct desk *d, const struct keys *from, int64_t head, int64_t first,
                    int64_t count) {
    const float *key = from->key + first * from->key_row + head * from->key_head;
    const float *value = from->value + first * from->value_row + head * from->value_head;
    for (int64_t l = 0; l < (count + PANEL - 1) / PANEL * PANEL; l++) {
        float *to = d->keys + l / PANEL * PANEL * w->key_dim + l % PANEL;
        ask_for(key + (l + AHEAD) * from->key_row, w->key_dim);
        for (int64_t i = 0; i < w->key_dim; i++) to[i * PANEL] = l < count ? key[l * from->key_row + i] : 0;
    }
    for (int64_t l = 0; l < count; l++) {
        ask_for(value + (l + AHEAD) * from->value_row, w->value_dim);
        for (int64_t i = 0; i < d->width; i += PANEL) {
            float *to = d->values + i * KEYS + l * PANEL;
            const float *row = value + l * from->value_row + i;
            if (i + PANEL <= w->value_dim)
                memcpy(to, row, sizeof(float) * PANEL);
            else
                for (int64_t j = 0; j < PANEL; j++) to[j] = i + j < w->value_dim ? row[j] : 0;
        }
    }
}

/* Make the first `seen` of a vector's scores weights, the others up to `count` 0, and correct its sums so far. There is
   room for whole registers behind the scores. */
static void soften(const struct desk *d, int64_t vector, float *row, int64_t seen, int64_t count) {
    for (int64_t l = seen; l < count || l % LANES; l++) row[l] = -INFINITY;
    const float before = d->most[vector];
    floats most = (floats){0} + before;
    for (int64_t l = 0; l < seen; l += LANES) most = larger(most, load(row + l));
    const float high = largest(most);
    floats added = {0};
    for (int64_t l = 0; l < seen; l += LANES) {
        const floats weights = power_of_two((load(row + l) - high) * LOG2_E); /* differences are exact, products are not */
        added += weights;
        store(row + l, weights);
    }
    for (int64_t l = seen; l < count; l++) row[l] = 0;
    if (high != before) {
        const float factor = before == -INFINITY ? 0 : power_of_two((floats){0} + (before - high) * LOG2_E)[0];
        float *sums = d->sums + vector * d->width;
        for (int64_t i = 0; i < d->width; i++) sums[i] *= factor;
        d->total[vector] *= factor;
        d->most[vector] = high;
    }
    d->total[vector] += sum(added);
}

/* Vectors [first, end) against `count` keys that are laid out; vector v sees all of them, or the first
   `v / copies - before` (causal). */
static void attend_block(const struct work *w, const struct desk *d, int64_t first, int64_t end, int64_t count,
                         int is_causal, int64_t before) {
    for (int64_t v = first; v < end; v += VECTORS) {
        const int64_t vectors = end - v < VECTORS ? end - v : VECTORS;
        int64_t most = count;
        if (is_causal) {
            const int64_t seen = (v + vectors - 1) / w->copies - before;
            most = seen < count ? seen : count;
        }
        if (most <= 0) continue;
        for (int64_t l = 0; l < most; l += PANEL)
            products(vectors, d->query + v * w->key_dim, w->key_dim, d->keys + l * w->key_dim, w->key_dim, 0,
                     d->scores + l, KEYS);
        for (int64_t i = 0; i < vectors; i++) {
            int64_t seen = is_causal ? (v + i) / w->copies - before : most;
            seen = seen < 0 ? 0 : seen < most ? seen : most;
            if (seen)
                soften(d, v + i, d->scores + i * KEYS, seen, most);
            else
                memset(d->scores + i * KEYS, 0, sizeof(float) * most);
        }
        for (int64_t i = 0; i < d->width; i += PANEL)
            products(vectors, d->scores, KEYS, d->values + i * KEYS, most, 1, d->sums + v * d->width + i, d->width);
    }
}

/* Rows [first, end) of a run, of one head of keys and values. */
static void attend_rows(const struct work *w, const struct desk *d, const struct run *run, int64_t head, int64_t first,
                        int64_t end) {
    const int64_t vectors = (end - first) * w->copies;
    for (int64_t v = 0; v < vectors; v++) {
        const float *from = w->query + (first + v / w->copies) * w->query_row +
                            (head * w->copies + v % w->copies) * w->query_head;
        for (int64_t i = 0; i < w->key_dim; i++) d->query[v * w->key_dim + i] = from[i] * w->scaling;
        d->most[v] = -INFINITY;
        d->total[v] = 0;
    }
    memset(d->sums, 0, sizeof(float) * vectors * d->width);
    if (run->prefix >= 0) {
        const struct keys *prefix = w->keys + run->prefix;
        for (int64_t l = 0; l < prefix->length; l += KEYS) {
            const int64_t count = prefix->length - l < KEYS ? prefix->length - l : KEYS;
            lay_out(w, d, prefix, head, l, count);
            attend_block(w, d, 0, vectors, count, 0, 0);
        }
    }
    for (int64_t s = run->span; s < run->span_end; s++) {
        const struct span *span = w->spans + s;
        const int64_t from = span->first > first ? span->first : first, to = span->end < end ? span->end : end;
        if (from >= to) continue;
        for (int64_t l = span->first; l < to; l += KEYS) { /* row r sees the keys of rows up to r */
            const int64_t count = to - l < KEYS ? to - l : KEYS;
            lay_out(w, d, w->keys + span->own, head, l - span->first, count);
            attend_block(w, d, (from - first) * w->copies, (to - first) * w->copies, count, 1, l - first - 1);
        }
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = first + v / w->copies, of = head * w->copies + v % w->copies;
        float *to = w->output + (row * w->kv_heads * w->copies + of) * w->value_dim;
        const float part = 1 / d->total[v];
        for (int64_t i = 0; i < w->value_dim; i++) to[i] = d->sums[v * d->width + i] * part;
    }
}

/* Rows of a task: few enough for the second cache. */
static int64_t rows_of_task(const struct work *w) {
    const int64_t rows = 8 * VECTORS / w->copies;
    return rows > 0 ? rows : 1;
}

/* Tasks, until none is left; called from several threads at once. */
void attend_prompts(void *of) {
    struct work *w = of;
    const int64_t rows = rows_of_task(w), most = rows * w->copies;
    struct desk d = {.width = (w->value_dim + PANEL - 1) / PANEL * PANEL};
    const int64_t sizes[] = {most * w->key_dim, most * d.width,  most,          most,
                             KEYS * w->key_dim, KEYS * d.width, VECTORS * KEYS};
    float **parts[] = {&d.query, &d.sums, &d.most, &d.total, &d.keys, &d.values, &d.scores};
    int64_t size = 0;
    for (int i = 0; i < 7; i++) size += (sizes[i] + PANEL - 1) / PANEL * PANEL;
    float *memory = aligned_alloc(64, sizeof(float) * size);
    if (!memory) {
        __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    float *at = memory;
    for (int i = 0; i < 7; i++) {
        *parts[i] = at;
        at += (sizes[i] + PANEL - 1) / PANEL * PANEL;
    }
    const struct run *run = w->runs;
    int64_t before = 0; /* tasks of the runs before */
    for (int64_t task; (task = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->tasks;) {
        int64_t pieces;
        while (pieces = (run->end - run->first + rows - 1) / rows, task >= before + pieces * w->kv_heads) {
            before += pieces * w->kv_heads;
            run++;
        }
        const int64_t first = run->first + (task - before) / w->kv_heads * rows;
        attend_rows(w, &d, run, (task - before) % w->kv_heads, first, first + rows < run->end ? first + rows : run->end);
    }
    free(memory);
}
