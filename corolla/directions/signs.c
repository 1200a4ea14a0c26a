/* The inner loops of corolla/directions/signs.py; the definition is proto/signs-v1.md.
 *
 * Plain C99, loaded with ctypes. A sign is xored into the bits of a value, never multiplied, so no
 * compiler can contract the one addition that is left. Values pass through a local block of fp32:
 * it holds whole words, so the inner loops have a constant length, and is where half types widen. */

#include <stdint.h>
#include <string.h>

#if defined(_MSC_VER)
#include <intrin.h>
#define EXPORT __declspec(dllexport)
#define INLINE static __forceinline
#elif defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#else
#define EXPORT
#define INLINE static inline
#endif

/* One binary runs on any CPU: the loader picks the clone. It needs ifunc, that is glibc. */
#if defined(CLONES)
#elif defined(__x86_64__) && defined(__GLIBC__) && \
    ((defined(__clang__) && __clang_major__ >= 14) || (!defined(__clang__) && __GNUC__ >= 8))
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) (void)0
#endif

#define BLOCK 4096 /* values: 16 KiB of fp32, a third of a small L1 */
#define WORDS (BLOCK / 64)

/* setuptools exports the entry point of an extension module on some systems, so it must exist. */
EXPORT void *PyInit__signs(void) { return 0; }

EXPORT int64_t corolla_signs_version(void) { return 3; }

#if defined(__SIZEOF_INT128__)
__extension__ typedef unsigned __int128 u128;
#endif

INLINE uint64_t mulhi(uint64_t a, uint64_t b) {
#if defined(__SIZEOF_INT128__)
    return (uint64_t)(((u128)a * b) >> 64);
#elif defined(_MSC_VER) && (defined(_M_X64) || defined(_M_ARM64))
    return __umulh(a, b);
#else
    const uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32;
    const uint64_t lh = al * bh, hl = ah * bl;
    const uint64_t cross = ((al * bl) >> 32) + (uint32_t)lh + (uint32_t)hl;
    return ah * bh + (lh >> 32) + (hl >> 32) + (cross >> 32);
#endif
}

INLINE void philox(uint64_t c0, uint64_t c1, uint64_t c2, uint64_t c3, uint64_t k0, uint64_t k1,
                   uint64_t *out) {
    for (int round = 0; round < 10; round++) {
        const uint64_t h0 = mulhi(0xD2E7470EE14C6C93u, c0), l0 = 0xD2E7470EE14C6C93u * c0;
        const uint64_t h1 = mulhi(0xCA5A826395121157u, c2), l1 = 0xCA5A826395121157u * c2;
        c0 = h1 ^ c1 ^ k0;
        c1 = l1;
        c2 = h0 ^ c3 ^ k1;
        c3 = l0;
        k0 += 0x9E3779B97F4A7C15u;
        k1 += 0xBB67AE8584CAA73Bu;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* `blocks` times four words; the first word of the counter counts up. */
EXPORT void corolla_words(const uint64_t *counter, const uint64_t *key, int64_t blocks,
                          uint64_t *out) {
    for (int64_t b = 0; b < blocks; b++)
        philox(counter[0] + (uint64_t)b, counter[1], counter[2], counter[3], key[0], key[1],
               out + 4 * b);
}

/* The words of stream 0 for flat indices [from, to) of the block at `base`. */
INLINE void block_words(uint64_t *words, const uint64_t *key, uint64_t base, uint64_t from,
                        uint64_t to) {
    for (uint64_t b = from >> 8; b << 8 < to; b++)
        philox(b, 0, 0, 0, key[0], key[1], words + ((b << 8) - base) / 64);
}

INLINE uint64_t parity(uint64_t x) { /* 0 or all ones; x < 1024 */
    x ^= x >> 8;
    x ^= x >> 4;
    x ^= x >> 2;
    x ^= x >> 1;
    return 0 - (x & 1);
}

/* The signs of row k of the Hadamard matrix in columns 0..63. */
INLINE uint64_t pattern(uint64_t k) {
    static const uint64_t rows[6] = {0xAAAAAAAAAAAAAAAAu, 0xCCCCCCCCCCCCCCCCu, 0xF0F0F0F0F0F0F0F0u,
                                     0xFF00FF00FF00FF00u, 0xFFFF0000FFFF0000u, 0xFFFFFFFF00000000u};
    uint64_t bits = 0;
    for (int i = 0; i < 6; i++) bits ^= (0 - ((k >> i) & 1)) & rows[i];
    return bits;
}

INLINE float number(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

/* Without a branch, which would keep a loop from being vectorised. */
INLINE uint32_t either(int first, uint32_t a, uint32_t b) {
    const uint32_t mask = 0 - (uint32_t)first;
    return (a & mask) | (b & ~mask);
}

enum { FP32, BF16, FP16 };

INLINE void load(float *block, const void *from, uint64_t at, uint64_t count, int64_t type) {
    const uint16_t *half = (const uint16_t *)from + at;
    if (type == FP32)
        memcpy(block, (const float *)from + at, count * sizeof(float));
    else if (type == BF16)
        for (uint64_t i = 0; i < count; i++) block[i] = number((uint32_t)half[i] << 16);
    else
        for (uint64_t i = 0; i < count; i++) {
            const uint32_t h = half[i], size = h & 0x7FFFu, sign = (h & 0x8000u) << 16;
            const uint32_t bias = either(size < 0x7C00u, UINT32_C(112) << 23, UINT32_C(224) << 23);
            const uint32_t small = bits((float)(int32_t)size * 0x1p-24f); /* subnormal; exact */
            block[i] = number(sign | either(size < 0x0400u, small, (size << 13) + bias));
        }
}

INLINE void store(void *to, uint64_t at, const float *block, uint64_t count, int64_t type) {
    uint16_t *half = (uint16_t *)to + at;
    if (type == FP32)
        memcpy((float *)to + at, block, count * sizeof(float));
    else if (type == BF16)
        for (uint64_t i = 0; i < count; i++) {
            const uint32_t u = bits(block[i]), size = u & 0x7FFFFFFFu;
            const uint32_t even = (u + 0x7FFFu + (u >> 16 & 1)) >> 16;
            half[i] = (uint16_t)either(size > 0x7F800000u, u >> 16 | 0x40u, even);
        }
    else
        for (uint64_t i = 0; i < count; i++) {
            const uint32_t u = bits(block[i]), size = u & 0x7FFFFFFFu;
            const uint32_t even = (size - (UINT32_C(112) << 23) + 0xFFFu + (size >> 13 & 1)) >> 13;
            /* The last place of a number from 0.5 to 1 is fp16's smallest number. */
            const uint32_t small = bits(number(size) + 0.5f) - UINT32_C(0x3F000000);
            uint32_t h = either(size < 0x38800000u, small, even);
            h = either(size >= 0x477FF000u, 0x7C00u + 0x200u * (size > 0x7F800000u), h);
            half[i] = (uint16_t)(h | (u >> 16 & 0x8000u));
        }
}

#define FOUR(i) 1u << (i), 2u << (i), 4u << (i), 8u << (i)
static const uint32_t BIT[32] = {FOUR(0),  FOUR(4),  FOUR(8),  FOUR(12),
                                 FOUR(16), FOUR(20), FOUR(24), FOUR(28)};

/* The sign bit of a value, if bit i is set. Shifts by i would need more than SSE2. */
INLINE uint32_t sign_bit(uint32_t signs, int i) {
    return either((signs & BIT[i]) != 0, 0x80000000u, 0);
}

/* Adds 32 values under the signs given: a set bit takes away. */
INLINE void add32(float *block, const uint32_t *v, uint32_t signs) {
    for (int i = 0; i < 32; i++)
        block[i] += number(v[i] ^ sign_bit(signs, i));
}

/* out[i] = source[i] + sum over steps, in order, of z[i] * v[(start + i) & mask], where z is
 * direction k of a key. A step is five numbers: the key's two, k, mask, and the address of v's
 * mask + 1 >= 64 values; with mask 0, v is one value and the last number its bits. `out` may be
 * `source`; `type` is that of both. With several steps a block stays in the cache from its first to its last. */
EXPORT CLONES void corolla_add(void *out, const void *source, int64_t type, uint64_t start,
                               uint64_t count, int64_t steps, const uint64_t *table) {
    const uint64_t stop = start + count, size = type == FP32 ? 4 : 2;
    uint64_t words[WORDS];
    uint32_t same[64];
    float block[BLOCK];
    memset(block, 0, sizeof block); /* the values beside an edge are computed too */
    for (uint64_t from = start, to; from < stop; from = to) {
        const uint64_t base = from & ~(uint64_t)(BLOCK - 1);
        to = stop - base < BLOCK ? stop : base + BLOCK;
        load(block + (from - base), source, from - start, to - from, type);
        for (int64_t s = 0; s < steps; s++) {
            const uint64_t *step = table + 5 * s, mask = step[3];
            const uint64_t high = step[2] >> 6, low = pattern(step[2]);
            const uint32_t *values = same;
            if (mask)
                values = (const uint32_t *)(uintptr_t)step[4];
            else
                for (int i = 0; i < 64; i++) same[i] = (uint32_t)step[4];
            if (s == 0 || step[0] != step[-5] || step[1] != step[-4])
                block_words(words, step, base, from, to);
            for (uint64_t w = from >> 6; w << 6 < to; w++) {
                const uint64_t signs = words[w - (base >> 6)] ^ low ^ parity(high & w);
                const uint32_t *v = values + ((w << 6) & mask);
                float *x = block + ((w << 6) - base);
                if (s == 0 && stop - (w << 6) > BLOCK + 64) /* load the next block meanwhile */
                    for (uint64_t line = 0; line < 64 * size; line += 64)
                        PREFETCH((const char *)source + ((w << 6) + BLOCK - start) * size + line);
                add32(x, v, (uint32_t)signs);
                add32(x + 32, v + 32, (uint32_t)(signs >> 32));
            }
        }
        store(out, from - start, block + (from - base), to - from, type);
    }
}

/* sums[(start + i) & mask] += D[start + i] * x[i], in fp64 and in the order of i; mask >= 63. */
EXPORT CLONES void corolla_fold(const void *x, int64_t type, uint64_t start, uint64_t count,
                                const uint64_t *key, double *sums, uint64_t mask) {
    const uint64_t stop = start + count;
    uint64_t words[WORDS];
    float block[BLOCK];
    for (uint64_t from = start, to; from < stop; from = to) {
        const uint64_t base = from & ~(uint64_t)(BLOCK - 1);
        to = stop - base < BLOCK ? stop : base + BLOCK;
        if (to - from < BLOCK) memset(block, 0, sizeof block); /* adding a zero changes no sum */
        load(block + (from - base), x, from - start, to - from, type);
        block_words(words, key, base, from, to);
        for (uint64_t w = from >> 6; w << 6 < to; w++) {
            double *into = sums + ((w << 6) & mask);
            const float *values = block + ((w << 6) - base);
            for (int half = 0; half < 2; half++) {
                const uint32_t signs = (uint32_t)(words[w - (base >> 6)] >> (32 * half));
                for (int i = 0; i < 32; i++) {
                    const uint32_t value = bits(values[32 * half + i]);
                    into[32 * half + i] += (double)number(value ^ sign_bit(signs, i));
                }
            }
        }
    }
}
