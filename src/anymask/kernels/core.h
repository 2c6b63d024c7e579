/* Sparse convolution over kept weights alone: one primitive (gather) and its transpose in the weights (dot).
 *
 * Tensors are "batch-last": (channels, height, width, images), contiguous float32. A run is a row of output positions times a block of
 * `lanes` images, contiguous in a packed copy of the source rows that it needs (padding zeros included), which stays in the L2 cache:
 *
 *     gather   dst[o][run] = sum over kept k of row o:  val[k] * packed[off[k] + run]
 *     dot      grad[k]    += sum over runs:             g[o][run] * packed[off[k] + run]
 *
 * The forward pass and the input gradient are gathers with different tables, the weight gradient is a dot with those of the forward pass. Both
 * gradients at once are a gather and a dot with those of the input gradient: the input is not packed. Strides, padding, dilation and
 * groups are in the tables alone (src/anymask/kernels/plans.py makes them).
 */
#ifndef ANYMASK_CORE_H
#define ANYMASK_CORE_H
#include <stdint.h>

typedef struct {
  int64_t images, lanes;           /* innermost size; images in a block */
  int64_t src_channels, src_rows, src_cols;
  int64_t dst_channels, dst_rows, dst_cols;
  int64_t rows, row_start, row_step; /* destination rows row_start + j * row_step, j < rows */
  int64_t src_row_start, src_row_step; /* source row of j at the first tap: src_row_start + j * src_row_step */
  int64_t ring;                    /* packed rows, as many as the taps span; off has a table for each rotation */
  int64_t cols;                    /* positions of a run, in one column range */
  int64_t packed_cols;             /* positions of a packed row, likewise */
  int64_t strips, col_tiles;       /* row ranges and column ranges that are packed apart */
  int64_t kept;
  const int32_t *run_ptr;          /* [col_tiles + 1] into runs */
  const int32_t *runs;             /* [][3] of a packed row: source column (-1 for zeros), step to the next one, how many */
  const int32_t *dst_map;          /* [col_tiles][cols] destination column, -1 for what is not stored */
  const int32_t *rowptr;           /* [dst_channels + 1] */
  const int32_t *off;              /* [ring][kept] in floats */
  const int32_t *order;            /* [kept] the place of each among the values; NULL: its own */
} am_job;

/* All return 0, or -1 where memory ran out. `threads` >= 1. */
typedef int am_gather_fn(const am_job *, const float *src, const float *val, const float *bias, const float *add, int relu, float *dst, int threads);
typedef int am_dot_fn(const am_job *, const float *src, const float *g, float *grad, int threads);
/* `add`, of the shape of gx, is added to it; it may be NULL. Places of `grad` that no job has are left alone. */
typedef int am_both_fn(const am_job *, const float *g, const float *val, const float *x, const float *add, float *gx, float *grad, int threads);
typedef int am_norm_fn(int64_t channels, int64_t size, const float *x, const float *add, const float *weight, const float *bias, float eps,
                       int relu, float soft, int use_stats, float *mean, float *var, float *y, uint16_t *signs, int threads);
typedef int am_norm_back_fn(int64_t channels, int64_t size, const float *x, const float *add, const float *g, const float *weight, const float *bias,
                            const float *mean, const float *var, const uint16_t *signs, float eps, int relu, float soft, int use_stats, float *gx,
                            float *gadd, float *gweight, float *gbias, int threads);
typedef struct {
  int64_t images, channels, rows, cols, out_rows, out_cols, kh, kw, sh, sw, ph, pw, mean; /* mean: average instead of maximum */
} am_pool;
typedef int am_pool_fn(const am_pool *, const float *x, float *y, int threads);
typedef int am_pool_back_fn(const am_pool *, const float *x, const float *y, const float *g, float *gx, int threads);
typedef int am_soften_fn(int64_t size, const float *x, const float *g, float strength, float *y, int threads);
typedef int am_norm_pool_fn(const am_pool *, const float *x, const float *weight, const float *bias, float eps, float soft, int use_stats, float *mean,
                            float *var, float *y, uint8_t *place, int threads);
typedef int am_norm_pool_back_fn(const am_pool *, const float *x, const float *g, const uint8_t *place, const float *weight, const float *bias, const float *mean,
                                 const float *var, float eps, float soft, int use_stats, float *gx, float *gweight, float *gbias, int threads);
typedef int am_blocks_fn(int64_t blocks, const int32_t *first, const int32_t *order, const int64_t *from, const float *matrices, float strength,
                         float *g, int threads);
typedef struct {
  const char *name;
  int width; /* floats of a vector */
  am_gather_fn *gather;
  am_dot_fn *dot;
  am_both_fn *both;
  am_norm_fn *norm;
  am_norm_back_fn *norm_back;
  am_pool_fn *pool;
  am_pool_back_fn *pool_back;
  am_soften_fn *soften;
  am_norm_pool_fn *norm_pool;
  am_norm_pool_back_fn *norm_pool_back;
  am_blocks_fn *blocks;
} am_isa;

extern const am_isa am_portable, am_avx2, am_avx512;
float *am_scratch(int slot, int64_t floats); /* thread-local, grows only, 64-byte aligned; NULL where memory ran out */
#endif
