/* A latency histogram with logarithmic buckets: 64 to the octave, so a figure is at most 1.6 % off.
 * Knows nothing of what is measured; values are nanoseconds. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

enum { HIST_SUB_BITS = 6, HIST_SUB = 1 << HIST_SUB_BITS, HIST_OCTAVES = 40 };
enum { HIST_BUCKETS = HIST_SUB * (HIST_OCTAVES - HIST_SUB_BITS + 1) }; /* up to 18 minutes */

typedef struct {
    uint64_t count[HIST_BUCKETS], total;
    int64_t max;
    double sum;
} Histogram;

static inline void hist_add(Histogram *h, int64_t ns) {
    uint64_t v = ns > 0 ? (uint64_t)ns : 0;
    unsigned index;
    if (v < HIST_SUB) {
        index = (unsigned)v;
    } else {
        unsigned top = 63u - (unsigned)__builtin_clzll(v), shift = top - HIST_SUB_BITS;
        index = ((shift + 1) << HIST_SUB_BITS) + (unsigned)((v >> shift) & (HIST_SUB - 1));
        if (index >= HIST_BUCKETS) index = HIST_BUCKETS - 1;
    }
    h->count[index]++;
    h->total++;
    h->sum += (double)v;
    if (ns > h->max) h->max = ns;
}

/* The upper edge of the bucket that holds the quantile, but never more than the largest value. */
static inline int64_t hist_quantile(const Histogram *h, double q) {
    uint64_t rank = (uint64_t)(q * (double)h->total), seen = 0;
    for (unsigned i = 0; i < HIST_BUCKETS; i++) {
        seen += h->count[i];
        if (!h->count[i] || seen <= rank) continue;
        unsigned shift = i < HIST_SUB ? 0 : (i >> HIST_SUB_BITS) - 1;
        int64_t edge = i < HIST_SUB ? (int64_t)i + 1
                                    : (int64_t)((uint64_t)((i & (HIST_SUB - 1)) + HIST_SUB + 1)
                                                << shift);
        return edge < h->max ? edge : h->max;
    }
    return h->max;
}

#endif
