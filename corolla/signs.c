/* The inner loops of corolla/signs.py; the definition is proto/signs-v1.md.
 *
 * Plain C99, loaded with ctypes. Nothing here multiplies floating-point numbers: a sign is xored
 * into the bits of a value, so no compiler can contract the one addition that is left. Reads of
 * v and writes of whole words go through local blocks, so every loop has a constant length. */

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

EXPORT int64_t corolla_signs_version(void) { return 2; }

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

typedef union {
    uint32_t u;
    float f;
} bits32;

INLINE void add32(float *block, const uint32_t *v, uint32_t signs) {
    for (int i = 0; i < 32; i++) {
        bits32 x;
        x.u = v[i] ^ (signs & (UINT32_C(1) << i) ? UINT32_C(0x80000000) : 0);
        block[i] += x.f;
    }
}

/* out[i] = source[i] + sum over steps, in order, of z[i] * v[(start + i) & mask], where z is
 * direction k of a key. A step is five numbers: the key's two, k, mask, and the address of v's
 * mask + 1 >= 64 values; with mask 0, v is one value and the last number its bits. `out` may be
 * `source`. With several steps a block stays in the cache from its first to its last. */
EXPORT CLONES void corolla_add(float *out, const float *source, uint64_t start, uint64_t count,
                               int64_t steps, const uint64_t *table) {
    const uint64_t stop = start + count;
    uint64_t words[WORDS];
    uint32_t same[64];
    float block[BLOCK];
    memset(block, 0, sizeof block); /* the values beside an edge are computed too */
    for (uint64_t from = start, to; from < stop; from = to) {
        const uint64_t base = from & ~(uint64_t)(BLOCK - 1);
        to = stop - base < BLOCK ? stop : base + BLOCK;
        memcpy(block + (from - base), source + (from - start), (to - from) * sizeof(float));
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
                    for (int line = 0; line < 64; line += 16)
                        PREFETCH(source + ((w << 6) + BLOCK - start + line));
                add32(x, v, (uint32_t)signs);
                add32(x + 32, v + 32, (uint32_t)(signs >> 32));
            }
        }
        memcpy(out + (from - start), block + (from - base), (to - from) * sizeof(float));
    }
}

/* sums[(start + i) & mask] += D[start + i] * x[i], in fp64 and in the order of i; mask >= 63. */
EXPORT CLONES void corolla_fold(const float *x, uint64_t start, uint64_t count,
                                const uint64_t *key, double *sums, uint64_t mask) {
    const uint64_t stop = start + count;
    uint64_t words[WORDS];
    uint32_t block[BLOCK];
    for (uint64_t from = start, to; from < stop; from = to) {
        const uint64_t base = from & ~(uint64_t)(BLOCK - 1);
        to = stop - base < BLOCK ? stop : base + BLOCK;
        if (to - from < BLOCK) memset(block, 0, sizeof block); /* adding a zero changes no sum */
        memcpy(block + (from - base), x + (from - start), (to - from) * sizeof(float));
        block_words(words, key, base, from, to);
        for (uint64_t w = from >> 6; w << 6 < to; w++) {
            double *into = sums + ((w << 6) & mask);
            const uint32_t *values = block + ((w << 6) - base);
            for (int half = 0; half < 2; half++) {
                const uint32_t signs = (uint32_t)(words[w - (base >> 6)] >> (32 * half));
                for (int i = 0; i < 32; i++) {
                    bits32 y;
                    y.u = values[32 * half + i] ^
                          (signs & (UINT32_C(1) << i) ? UINT32_C(0x80000000) : 0);
                    into[32 * half + i] += (double)y.f;
                }
            }
        }
    }
}
