#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512vl,avx512dq,avx2,fma")
#include <immintrin.h>
#include <stdint.h>
#define V 16
#define TMAX 16
#define TBOTH 12
#define NAME(x) am_avx512_##x
typedef float vf16 __attribute__((vector_size(64)));
static inline __attribute__((always_inline)) void reduce4(const vf16 *a, float *to) {
  /* Four sums at once: transpose-add within 128-bit parts, then add the four parts. */
  const __m512 a0 = (__m512)a[0], a1 = (__m512)a[1], a2 = (__m512)a[2], a3 = (__m512)a[3];
  const __m512 s0 = _mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
  const __m512 s1 = _mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(s0, s1, 0x44), _mm512_shuffle_ps(s0, s1, 0xEE));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), q));
}
static inline __attribute__((always_inline)) vf16 reciprocal(vf16 x) { /* of what is no zero: 14 bits, and a step of Newton's; a division takes thrice as long */
  const vf16 r = (vf16)_mm512_rcp14_ps((__m512)x);
  return r * (2 - x * r);
}
static inline __attribute__((always_inline)) vf16 within(vf16 x, float far) { /* [-far, far]; NaN stays */
  return (vf16)_mm512_max_ps(_mm512_set1_ps(-far), _mm512_min_ps(_mm512_set1_ps(far), (__m512)x));
}
static inline __attribute__((always_inline)) vf16 rounded(vf16 x) { return (vf16)_mm512_roundscale_ps((__m512)x, 0); }
static inline __attribute__((always_inline)) vf16 times_power_of_2(vf16 x, vf16 n) { return (vf16)_mm512_scalef_ps((__m512)x, (__m512)n); }
#define POWERS_OF_2
typedef int32_t vi16 __attribute__((vector_size(64)));
static inline __attribute__((always_inline)) vi16 of_bytes(const uint8_t *from) {
  return (vi16)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i_u *)from));
}
static inline __attribute__((always_inline)) void to_bytes(uint8_t *to, vi16 v) { _mm_storeu_si128((__m128i_u *)to, _mm512_cvtepi32_epi8((__m512i)v)); }
#define BYTES
#define SIGNS(v) ((uint16_t)_mm512_cmp_ps_mask((__m512)(v), _mm512_setzero_ps(), _CMP_NLE_UQ))
#define OF_LANES(bits, g) ((vf)_mm512_maskz_mov_ps(bits, (__m512)(g)))
#define STREAM(p, v) _mm512_stream_ps(p, (__m512)(v))
#include "gather.inc"
#include "soft.inc"
#include "norm.inc"
#include "pool.inc"
#include "normpool.inc"
#include "blocks.inc"
const am_isa am_avx512 = {"avx512", V, NAME(gather), NAME(dot), NAME(both), NAME(norm), NAME(norm_back), NAME(pool), NAME(pool_back), NAME(soften), NAME(norm_pool), NAME(norm_pool_back), NAME(blocks)};
#else
typedef int am_empty;
#endif
