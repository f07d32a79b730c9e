/* What both ends of a benchmark's WebSocket need of RFC 6455: the handshake's accept key and the
 * frame header. Knows no socket. Header only, so that each program is one `cc` call. */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { OP_TEXT = 1, OP_BINARY = 2, OP_CLOSE = 8, OP_PING = 9, OP_PONG = 10 };
enum { KEY_CHARS = 24, ACCEPT_CHARS = 28, MAX_HEADER = 14, MAX_CONTROL = 125 };

static inline uint32_t wire_rol(uint32_t x, int n) { return (x << n) | (x >> (32 - n)); }

static void wire_sha1_block(uint32_t h[5], const uint8_t *block) {
    uint32_t w[80];
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)block[4 * i] << 24 | (uint32_t)block[4 * i + 1] << 16 |
               (uint32_t)block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 80; i++) w[i] = wire_rol(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (int i = 0; i < 80; i++) {
        uint32_t f, k;
        if (i < 20) f = (b & c) | (~b & d), k = 0x5a827999;
        else if (i < 40) f = b ^ c ^ d, k = 0x6ed9eba1;
        else if (i < 60) f = (b & c) | (b & d) | (c & d), k = 0x8f1bbcdc;
        else f = b ^ c ^ d, k = 0xca62c1d6;
        uint32_t next = wire_rol(a, 5) + f + e + k + w[i];
        e = d, d = c, c = wire_rol(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
}

static void wire_base64(const uint8_t *in, size_t len, char *out) {
    static const char alphabet[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < len; i += 3) {
        uint32_t v = (uint32_t)in[i] << 16 | (i + 1 < len ? (uint32_t)in[i + 1] << 8 : 0) |
                     (i + 2 < len ? in[i + 2] : 0);
        *out++ = alphabet[v >> 18];
        *out++ = alphabet[v >> 12 & 63];
        *out++ = i + 1 < len ? alphabet[v >> 6 & 63] : '=';
        *out++ = i + 2 < len ? alphabet[v & 63] : '=';
    }
    *out = 0;
}

/* Sec-WebSocket-Accept of a key: RFC 6455, 4.2.2. The input is 60 bytes, two SHA-1 blocks. */
static void wire_accept(const char key[KEY_CHARS], char out[ACCEPT_CHARS + 1]) {
    uint8_t message[128] = {0}, digest[20];
    uint32_t h[5] = {0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476, 0xc3d2e1f0};
    memcpy(message, key, KEY_CHARS);
    memcpy(message + KEY_CHARS, "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 36);
    message[60] = 0x80;
    message[126] = 60 * 8 >> 8, message[127] = 60 * 8 & 255;
    wire_sha1_block(h, message);
    wire_sha1_block(h, message + 64);
    for (int i = 0; i < 20; i++) digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
    wire_base64(digest, sizeof digest, out);
}

/* Writes the header of an unfragmented frame, returns its length; the mask key is not written. */
static inline size_t wire_header(uint8_t *out, int opcode, size_t len, int masked) {
    uint8_t mask_bit = masked ? 0x80 : 0;
    out[0] = (uint8_t)(0x80 | opcode);
    if (len < 126) {
        out[1] = (uint8_t)(mask_bit | len);
        return 2;
    }
    if (len < 65536) {
        out[1] = mask_bit | 126, out[2] = (uint8_t)(len >> 8), out[3] = (uint8_t)len;
        return 4;
    }
    out[1] = mask_bit | 127;
    for (int i = 0; i < 8; i++) out[2 + i] = (uint8_t)((uint64_t)len >> (56 - 8 * i));
    return 10;
}

/* Reads a header: its length with the mask key, or 0 while it is not all there. */
static inline size_t wire_parse(const uint8_t *p, size_t have, int *opcode, uint64_t *len,
                                int *masked) {
    if (have < 2) return 0;
    size_t header = 2;
    *opcode = p[0] & 15;
    *masked = p[1] >> 7;
    *len = p[1] & 127;
    if (*len == 126) {
        if (have < 4) return 0;
        *len = (uint64_t)p[2] << 8 | p[3];
        header = 4;
    } else if (*len == 127) {
        if (have < 10) return 0;
        *len = 0;
        for (int i = 0; i < 8; i++) *len = *len << 8 | p[2 + i];
        header = 10;
    }
    header += *masked ? 4u : 0u;
    return have < header ? 0 : header;
}

/* XORs src with the mask key into dst, eight bytes at a time. */
static inline void wire_mask(uint8_t *dst, const uint8_t *src, size_t len, uint32_t key) {
    uint64_t wide = (uint64_t)key << 32 | key, word;
    size_t i = 0;
    for (; i + 8 <= len; i += 8) {
        memcpy(&word, src + i, 8);
        word ^= wide;
        memcpy(dst + i, &word, 8);
    }
    const uint8_t *bytes = (const uint8_t *)&wide;
    for (; i < len; i++) dst[i] = src[i] ^ bytes[i & 7];
}

#endif
