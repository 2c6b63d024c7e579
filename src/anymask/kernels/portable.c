#define V 4
#define TMAX 8
#define TBOTH 4
#define NAME(x) am_portable_##x
typedef float vf4 __attribute__((vector_size(16)));
static inline __attribute__((always_inline)) void reduce4(const vf4 *a, float *to) {
  for (int i = 0; i < 4; i++) to[i] += a[i][0] + a[i][1] + a[i][2] + a[i][3];
}
static inline __attribute__((always_inline)) vf4 reciprocal(vf4 x) { return 1 / x; }
#define STREAM(p, v) store(p, v)
#include "gather.inc"
#include "soft.inc"
#include "norm.inc"
#include "pool.inc"
#include "normpool.inc"
#include "blocks.inc"
const am_isa am_portable = {"portable", V, NAME(gather), NAME(dot), NAME(both), NAME(norm), NAME(norm_back), NAME(pool), NAME(pool_back), NAME(soften), NAME(norm_pool), NAME(norm_pool_back), NAME(blocks)};
