/* Which instruction set, and scratch memory. The interface that src/anymask/kernels/library.py calls. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include "core.h"

float *am_scratch(int slot, int64_t floats) {
  static _Thread_local struct {
    float *at;
    int64_t size;
  } slots[2];
#ifdef __SANITIZE_ADDRESS__ /* exactly what was asked for, or nobody would see who reads on */
  free(slots[slot].at);
  slots[slot].at = malloc((size_t)floats * sizeof(float));
  return slots[slot].at;
#endif
  if (slots[slot].size >= floats) return slots[slot].at;
  free(slots[slot].at);
  slots[slot].size = 0;
  const size_t page = (size_t)2 << 20; /* huge pages: a tile touches thousands of small ones otherwise */
  const size_t bytes = ((size_t)floats * sizeof(float) + page - 1) / page * page;
  if (posix_memalign((void **)&slots[slot].at, page, bytes)) return slots[slot].at = NULL;
#ifdef MADV_HUGEPAGE
  madvise(slots[slot].at, bytes, MADV_HUGEPAGE);
#endif
  slots[slot].size = floats;
  return slots[slot].at;
}

static const am_isa *chosen;

/* Use the instruction set of this name, or the best one where it is NULL; its name, or NULL where this machine lacks it. */
const char *am_use(const char *name) {
  const am_isa *have[3];
  int n = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) have[n++] = &am_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) have[n++] = &am_avx2;
#endif
  have[n++] = &am_portable;
  for (int i = 0; i < n; i++)
    if (!name || !strcmp(name, have[i]->name)) {
      chosen = have[i];
      return chosen->name;
    }
  return NULL;
}

int am_version(void) { return 7; } /* of all these functions; library.py has the same, or does without them */

int am_width(void) { return chosen->width; }

int am_gather(const am_job *j, const float *src, const float *val, const float *bias, const float *add, int relu, float *dst, int threads) {
  return chosen->gather(j, src, val, bias, add, relu, dst, threads);
}

int am_dot(const am_job *j, const float *src, const float *g, float *grad, int threads) { return chosen->dot(j, src, g, grad, threads); }

int am_both(const am_job *j, const float *g, const float *val, const float *x, const float *add, float *gx, float *grad, int threads) {
  return chosen->both(j, g, val, x, add, gx, grad, threads);
}

int am_norm(int64_t channels, int64_t size, const float *x, const float *add, const float *weight, const float *bias, float eps, int relu,
            float soft, int use_stats, float *mean, float *var, float *y, uint16_t *signs, int threads) {
  return chosen->norm(channels, size, x, add, weight, bias, eps, relu, soft, use_stats, mean, var, y, signs, threads);
}

int am_norm_back(int64_t channels, int64_t size, const float *x, const float *add, const float *g, const float *weight, const float *bias, const float *mean,
                 const float *var, const uint16_t *signs, float eps, int relu, float soft, int use_stats, float *gx, float *gadd, float *gweight, float *gbias, int threads) {
  return chosen->norm_back(channels, size, x, add, g, weight, bias, mean, var, signs, eps, relu, soft, use_stats, gx, gadd, gweight, gbias, threads);
}

/* What a norm remembers moves by `share` towards the statistics of a batch; `unbiased` times its variance is that of all there could be. */
int am_norm_tracking(int64_t channels, const float *mean, const float *var, float share, float unbiased, float *running_mean, float *running_var,
                     int64_t *batches) {
  for (int64_t c = 0; c < channels; c++) {
    running_mean[c] = (1 - share) * running_mean[c] + share * mean[c];
    running_var[c] = (1 - share) * running_var[c] + share * unbiased * var[c];
  }
  ++*batches;
  return 0;
}

/* x (rows, cols) to y (cols, rows), in blocks of cache lines. */
int am_transpose(int64_t rows, int64_t cols, const float *x, float *y, int threads) {
  const int64_t B = 16;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static)
#endif
  for (int64_t c0 = 0; c0 < cols; c0 += B)
    for (int64_t r0 = 0; r0 < rows; r0 += B) {
      const int64_t c1 = c0 + B < cols ? c0 + B : cols, r1 = r0 + B < rows ? r0 + B : rows;
      for (int64_t r = r0; r < r1; r++) __builtin_prefetch(x + r * cols + c0 + 8 * B); /* rows are pages apart, where no prefetcher looks */
      for (int64_t c = c0; c < c1; c++)
        for (int64_t r = r0; r < r1; r++) y[c * rows + r] = x[r * cols + c];
    }
  (void)threads;
  return 0;
}

int am_pooling(const am_pool *p, const float *x, float *y, int threads) { return chosen->pool(p, x, y, threads); }

int am_pooling_back(const am_pool *p, const float *x, const float *y, const float *g, float *gx, int threads) {
  return chosen->pool_back(p, x, y, g, gx, threads);
}

int am_softening(int64_t size, const float *x, const float *g, float strength, float *y, int threads) {
  return chosen->soften(size, x, g, strength, y, threads);
}

int am_norm_pooling(const am_pool *p, const float *x, const float *weight, const float *bias, float eps, float soft, int use_stats, float *mean,
                    float *var, float *y, uint8_t *place, int threads) {
  return chosen->norm_pool(p, x, weight, bias, eps, soft, use_stats, mean, var, y, place, threads);
}

int am_norm_pooling_back(const am_pool *p, const float *x, const float *g, const uint8_t *place, const float *weight, const float *bias, const float *mean, const float *var,
                         float eps, float soft, int use_stats, float *gx, float *gweight, float *gbias, int threads) {
  return chosen->norm_pool_back(p, x, g, place, weight, bias, mean, var, eps, soft, use_stats, gx, gweight, gbias, threads);
}

int am_block_products(int64_t blocks, const int32_t *first, const int32_t *order, const int64_t *from, const float *matrices, float strength, float *g,
                      int threads) {
  return chosen->blocks(blocks, first, order, from, matrices, strength, g, threads);
}
