/* The floor: what broadcasting costs when nothing but the kernel is left of it.
 *
 * Every turn of the loop reads the frames that arrived, unmasks them into one batch, and ends with
 * one send() of that batch to every client. It keeps no books, checks no limits, and knows of slow
 * clients only that a short send has to be finished: it waits for that client, all others too.
 *
 * usage: floor PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../wire.h"

enum { MAX_FDS = 32768, MAX_EVENTS = 1024, READ_BYTES = 1 << 18, BATCH_BYTES = 1 << 22 };
enum { CARRY_BYTES = 1 << 17 }; /* an unfinished head or frame; a longer one ends the connection */

typedef struct {
    uint8_t *carry;
    size_t carried;
    int slot; /* where the client stands in `clients`; -1 before its handshake */
} Conn;

static Conn conns[MAX_FDS];
static int clients[MAX_FDS], client_count, epoll_fd;
static uint8_t input[CARRY_BYTES + READ_BYTES], batch[BATCH_BYTES];
static size_t batched;

static void drop(int fd) {
    Conn *c = &conns[fd];
    if (c->slot >= 0) {
        clients[c->slot] = clients[--client_count];
        conns[clients[c->slot]].slot = c->slot;
    }
    free(c->carry);
    *c = (Conn){.slot = -1};
    close(fd);
}

/* Returns 0 when the client is gone; it is dropped by the read that finds out. */
static int send_all(int fd, const uint8_t *data, size_t len) {
    while (len) {
        ssize_t n = send(fd, data, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, 1000);
        } else if (n < 0 && errno != EINTR) {
            return 0;
        } else if (n > 0) {
            data += n, len -= (size_t)n;
        }
    }
    return 1;
}

static void flush(void) {
    if (batched)
        for (int i = 0; i < client_count; i++) send_all(clients[i], batch, batched);
    batched = 0;
}

/* Returns the bytes of the request's head, 0 while it is not all there, -1 for a bad one. */
static ssize_t handshake(int fd, uint8_t *p, size_t have) {
    static const char name[] = "\r\nSec-WebSocket-Key: ";
    uint8_t *end = memmem(p, have, "\r\n\r\n", 4);
    if (!end) return 0;
    char *key = memmem(p, (size_t)(end - p), name, sizeof name - 1);
    if (!key || (size_t)((char *)end - key) < sizeof name - 1 + KEY_CHARS) return -1;
    char accept_key[ACCEPT_CHARS + 1], answer[256];
    wire_accept(key + sizeof name - 1, accept_key);
    int len = snprintf(answer, sizeof answer,
                       "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                       "Connection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
                       accept_key);
    if (!send_all(fd, (uint8_t *)answer, (size_t)len)) return -1;
    conns[fd].slot = client_count;
    clients[client_count++] = fd;
    return end + 4 - p;
}

/* One frame: data goes into the batch, a ping is answered. Returns 0 when the connection ends. */
static int frame(int fd, int opcode, const uint8_t *key, const uint8_t *payload, size_t len) {
    uint32_t mask;
    memcpy(&mask, key, 4);
    if (opcode == OP_TEXT || opcode == OP_BINARY) {
        if (batched + MAX_HEADER + len > BATCH_BYTES) flush();
        batched += wire_header(batch + batched, opcode, len, 0);
        wire_mask(batch + batched, payload, len, mask);
        batched += len;
        return 1;
    }
    if (opcode == OP_PING && len <= MAX_CONTROL) {
        uint8_t pong[2 + MAX_CONTROL];
        size_t header = wire_header(pong, OP_PONG, len, 0);
        wire_mask(pong + header, payload, len, mask);
        return send_all(fd, pong, header + len);
    }
    return opcode == OP_PONG;
}

/* Returns what is left over of an unfinished frame, -1 when the connection ends. */
static ssize_t take(int fd, uint8_t *p, size_t have) {
    if (conns[fd].slot < 0) {
        ssize_t head = handshake(fd, p, have);
        if (head <= 0) return head < 0 ? -1 : (ssize_t)have;
        p += head, have -= (size_t)head;
    }
    for (;;) {
        int opcode, masked;
        uint64_t len;
        size_t header = wire_parse(p, have, &opcode, &len, &masked);
        if (header && (!masked || len > CARRY_BYTES - MAX_HEADER)) return -1;
        if (!header || have < header + len) return (ssize_t)have;
        if (!frame(fd, opcode, p + header - 4, p + header, (size_t)len)) return -1;
        p += header + len, have -= header + (size_t)len;
    }
}

static void readable(int fd) {
    Conn *c = &conns[fd];
    if (c->carried) memcpy(input, c->carry, c->carried);
    ssize_t n = recv(fd, input + c->carried, READ_BYTES, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN) drop(fd);
        return;
    }
    size_t have = c->carried + (size_t)n;
    ssize_t left = take(fd, input, have);
    if (left < 0 || left > CARRY_BYTES) {
        drop(fd);
        return;
    }
    c->carried = (size_t)left;
    if (!left) return;
    if (!c->carry && !(c->carry = malloc(CARRY_BYTES))) exit(1);
    memcpy(c->carry, input + have - left, (size_t)left);
}

static void watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event)) exit(1);
}

static void accept_all(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        if (fd >= MAX_FDS) {
            close(fd);
            continue;
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        watch(fd);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
        perror("floor");
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: floor PORT\n"), 2;
    for (int i = 0; i < MAX_FDS; i++) conns[i].slot = -1;
    epoll_fd = epoll_create1(0);
    int listener = listen_on(atoi(argv[1]));
    watch(listener);
    puts("ready");
    fflush(stdout);
    struct epoll_event events[MAX_EVENTS];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, MAX_EVENTS, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == listener) accept_all(listener);
            else readable(events[i].data.fd);
        }
        flush();
    }
}
