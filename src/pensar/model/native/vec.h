// Vectors of L lanes in GCC's portable notation; intrinsics only for what it cannot say: fused products and bytes.
// The build switches contraction off, so that a sum is rounded as it is written, in every kernel and for any tile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE static inline __attribute__((always_inline))

#if defined(PENSAR_GENERIC)
constexpr int L = 4, NV = 4;
#elif defined(__AVX512F__)
constexpr int L = 16, NV = 2;
#elif defined(__AVX2__)
constexpr int L = 8, NV = 2;
#else
constexpr int L = 4, NV = 4;
#endif

constexpr int NR = L * NV;  // columns of a panel

typedef float Vf __attribute__((vector_size(4 * L)));
typedef int32_t Vi __attribute__((vector_size(4 * L)));
typedef uint32_t Vu __attribute__((vector_size(4 * L)));
typedef uint8_t Vb __attribute__((vector_size(4 * L)));
typedef int8_t Vs __attribute__((vector_size(L)));     // as many bytes as lanes
typedef uint16_t Vh __attribute__((vector_size(2 * L)));

template <class V, class T>
INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V, class T>
INLINE void store(T* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

INLINE Vf splat(float x) { return x - Vf{}; }
INLINE Vi splat(int32_t x) { return x - Vi{}; }

INLINE Vf fma(Vf a, Vf b, Vf c) {
#if defined(PENSAR_GENERIC)
    return a * b + c;
#elif defined(__AVX512F__)
    return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (Vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE Vf select(Vi mask, Vf a, Vf b) { return (Vf)((mask & (Vi)a) | (~mask & (Vi)b)); }
INLINE Vf max(Vf a, Vf b) { return select(a > b, a, b); }
INLINE Vf min(Vf a, Vf b) { return select(a < b, a, b); }
INLINE Vf abs(Vf a) { return (Vf)((Vi)a & 0x7fffffff); }

// Halves added until one lane is left: an order that depends on nothing.
INLINE float sum(Vf v) {
    float a[L];
    store(a, v);
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}

INLINE float max(Vf v) {
    float a[L];
    store(a, v);
    for (int half = L / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    return a[0];
}

// To the nearest integer, ties to even, for |x| < 2^22: the float 1.5 * 2^23 has no bits left for a fraction.
INLINE Vi nearest(Vf x) {
    const Vf magic = splat(12582912.0f);
    return (Vi)(x + magic) - (Vi)magic;
}

INLINE Vf from_bfloat16(Vh h) {
#if defined(__AVX512F__) && !defined(PENSAR_GENERIC)
    return (Vf)((Vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);  // GCC spreads two halves of the vector and joins them
#else
    return (Vf)(__builtin_convertvector(h, Vu) << 16);
#endif
}

// Two vectors from one of words: a shift and a mask, where halves side by side would have to be spread first.
INLINE void halves(const void* words, Vf& low, Vf& high) {
    const Vu both = load<Vu>(words);
    low = (Vf)(both << 16);
    high = (Vf)(both & 0xffff0000);
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2, by Taylor's series to r^7 / 7!, whose rest is 5e-9. 0 below -87.3, exp(88) from
// 88 on; NaN stays NaN.
INLINE Vf exp(Vf x) {
    const Vf top = splat(88.0f), bottom = splat(-87.3f);
    const Vi vanishes = x < bottom;
    x = select(x > top, top, x);
    x = select(x < bottom, bottom, x);
    const Vi n = nearest(x * 1.44269504f);
    const Vf whole = __builtin_convertvector(n, Vf);
    Vf r = fma(whole, splat(-0.693359375f), x);  // ln(2) in two parts, the first with few bits
    r = fma(whole, splat(2.12194440e-4f), r);
    Vf y = splat(1.0f / 5040);
    y = fma(y, r, splat(1.0f / 720));
    y = fma(y, r, splat(1.0f / 120));
    y = fma(y, r, splat(1.0f / 24));
    y = fma(y, r, splat(1.0f / 6));
    y = fma(y, r, splat(0.5f));
    y = fma(y, r, splat(1.0f));
    y = fma(y, r, splat(1.0f));
    return select(vanishes, Vf{}, y * (Vf)((n + 127) << 23));
}

// acc + the products of L quads of weight bytes with one quad of signed bytes, exactly. A weight byte holds w + OFFSET,
// w in -127 .. 127; the caller takes OFFSET times the sum of x off.
#if !defined(PENSAR_GENERIC) && ((defined(__AVX512VNNI__) && defined(__AVX512F__)) || defined(__AVXVNNI__))
constexpr int OFFSET = 128;
#else
constexpr int OFFSET = 0;
#endif

INLINE Vi dot_generic(Vi acc, Vb w, int32_t x) {
    int8_t bytes[4 * L], quad[4];
    store(bytes, w);
    std::memcpy(quad, &x, 4);
    for (int i = 0; i < L; i++)
        for (int j = 0; j < 4; j++) acc[i] += bytes[4 * i + j] * quad[j];
    return acc;
}

INLINE Vi dot(Vi acc, Vb w, int32_t x) {
#if defined(PENSAR_GENERIC)
    return dot_generic(acc, w, x);
#elif defined(__AVX512VNNI__) && defined(__AVX512F__)
    return (Vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX512BW__)
    // Products of magnitudes at most 127 * 127 fit two to 16 bits; the weight's sign goes to x.
    const __m512i a = (__m512i)w, b = _mm512_set1_epi32(x);
    const __m512i turned = _mm512_mask_sub_epi8(b, _mm512_movepi8_mask(a), _mm512_setzero_si512(), b);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(a), turned);
    return acc + (Vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__)
    return (Vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#elif defined(__AVX2__)
    const __m256i a = (__m256i)w, b = _mm256_set1_epi32(x);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
    return acc + (Vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Vi)vdotq_s32((int32x4_t)acc, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
#else
    return dot_generic(acc, w, x);
#endif
}

// The same for weights in 0 .. 15, which need no offset.
INLINE Vi dot_nibbles(Vi acc, Vb w, int32_t x) {
#if !defined(PENSAR_GENERIC) && defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
    return acc + (Vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    return dot(acc, w, x);
#endif
}
