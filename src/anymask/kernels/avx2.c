#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>
#include <stdint.h>
#define V 8
#define TMAX 10 /* of 16 registers: a tile, its weight, and four sums in dot */
#define TBOTH 5
#define NAME(x) am_avx2_##x
typedef float vf8 __attribute__((vector_size(32)));
static inline __attribute__((always_inline)) void reduce4(const vf8 *a, float *to) {
  const __m256 s0 = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]), s1 = _mm256_hadd_ps((__m256)a[2], (__m256)a[3]);
  const __m256 s = _mm256_hadd_ps(s0, s1);
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), q));
}
static inline __attribute__((always_inline)) vf8 reciprocal(vf8 x) { return 1 / x; } /* 12 bits and a step of Newton's are too few */
typedef int32_t vi8 __attribute__((vector_size(32)));
static inline __attribute__((always_inline)) vi8 of_bytes(const uint8_t *from) {
  return (vi8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i_u *)from));
}
static inline __attribute__((always_inline)) void to_bytes(uint8_t *to, vi8 v) {
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i_u *)to, _mm_packus_epi16(half, half));
}
#define BYTES
#define SIGNS(v) ((uint16_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)(v), _mm256_setzero_ps(), _CMP_NLE_UQ)))
#define STREAM(p, v) _mm256_stream_ps(p, (__m256)(v))
#include "gather.inc"
#include "soft.inc"
#include "norm.inc"
#include "pool.inc"
#include "normpool.inc"
#include "blocks.inc"
const am_isa am_avx2 = {"avx2", V, NAME(gather), NAME(dot), NAME(both), NAME(norm), NAME(norm_back), NAME(pool), NAME(pool_back), NAME(soften), NAME(norm_pool), NAME(norm_pool_back), NAME(blocks)};
#else
typedef int am_empty;
#endif
