/* Two Philox generators with 10 rounds for zeroth_order.py to compare; Salmon et al., SC 2011.
 *
 * Each writes `blocks` times four words. The first word of the counter counts up, without a carry. */

#include <stdint.h>

__extension__ typedef unsigned __int128 u128;

void philox4x64(const uint64_t *counter, const uint64_t *key, int64_t blocks, uint64_t *out) {
    for (int64_t b = 0; b < blocks; b++) {
        uint64_t c0 = counter[0] + (uint64_t)b, c1 = counter[1], c2 = counter[2], c3 = counter[3];
        uint64_t k0 = key[0], k1 = key[1];
        for (int round = 0; round < 10; round++) {
            const u128 p = (u128)0xD2E7470EE14C6C93u * c0, q = (u128)0xCA5A826395121157u * c2;
            c0 = (uint64_t)(q >> 64) ^ c1 ^ k0;
            c1 = (uint64_t)q;
            c2 = (uint64_t)(p >> 64) ^ c3 ^ k1;
            c3 = (uint64_t)p;
            k0 += 0x9E3779B97F4A7C15u;
            k1 += 0xBB67AE8584CAA73Bu;
        }
        out[4 * b] = c0;
        out[4 * b + 1] = c1;
        out[4 * b + 2] = c2;
        out[4 * b + 3] = c3;
    }
}

#define LANES 32 /* counters at a time: gcc unrolls shorter loops before it would use vectors */

void philox4x32(const uint32_t *counter, const uint32_t *key, int64_t blocks, uint32_t *out) {
    for (int64_t b = 0; b < blocks; b += LANES) {
        uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES], k0 = key[0], k1 = key[1];
        for (int i = 0; i < LANES; i++) {
            c0[i] = counter[0] + (uint32_t)b + (uint32_t)i;
            c1[i] = counter[1];
            c2[i] = counter[2];
            c3[i] = counter[3];
        }
        for (int round = 0; round < 10; round++) {
            for (int i = 0; i < LANES; i++) {
                const uint64_t p = (uint64_t)0xD2511F53u * c0[i], q = (uint64_t)0xCD9E8D57u * c2[i];
                c0[i] = (uint32_t)(q >> 32) ^ c1[i] ^ k0;
                c1[i] = (uint32_t)q;
                c2[i] = (uint32_t)(p >> 32) ^ c3[i] ^ k1;
                c3[i] = (uint32_t)p;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        const int64_t left = blocks - b < LANES ? blocks - b : LANES;
        for (int64_t i = 0; i < left; i++) {
            out[4 * (b + i)] = c0[i];
            out[4 * (b + i) + 1] = c1[i];
            out[4 * (b + i) + 2] = c2[i];
            out[4 * (b + i) + 3] = c3[i];
        }
    }
}
