/* The load generator: WebSocket clients by the thousand on one core, which check all they receive.
 *
 * One thread, one epoll. A data frame's payload is text: publisher, sequence number and time stamp
 * as fixed-width nibbles, then filler, so that reading it costs a handful of instructions and the
 * frames are walked where recv() put them. Every client checks every publisher's sequence, so loss,
 * duplication and reordering are counted exactly, not sampled. The server's CPU time is read from
 * its process clock at the very edges of the measured window.
 *
 * With --deflate the clients offer permessage-deflate. Where messages stand alone (no context
 * takeover), the same message should be the same bytes for all clients: it is inflated and checked
 * once, and every client's copy is compared with it in full. Otherwise each inflates its own.
 *
 * usage: loadgen MODE --port PORT [--name value ...]; see the table of options and bench/README.md.
 * The result is one JSON object on standard output, after the line {"event":"open",...}.
 */
#define _GNU_SOURCE
#define ZLIB_CONST
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

#include "histogram.h"
#include "wire.h"

enum { MAX_EVENTS = 1024, READ_BYTES = 1 << 18, MAX_CONNS = 60000, MAX_PUBLISHERS = 4096 };
enum { STAMPED_BYTES = 32, MAX_SIZE = 1 << 16, MIN_CARRY = 1024, DUE_MESSAGES = 4096 };
enum { MAX_GAPS = 4096, PENDING_PINGS = 1 << 16, MAX_SECONDS = 3600 };
enum { V1_HEADER = 128 }; /* of a message of relay.v1, at most */
enum { MAX_EXTRA_HEADER = 2048, BODIES = 128, KNOWN = 1024, MAX_LIST = 16 };
enum { TEXT_FRAME = 0x80 | OP_TEXT, RSV1 = 0x40, DEFLATED_FRAME = TEXT_FRAME | RSV1 };
static const int64_t SECOND = 1000000000;
static const int64_t OPEN_TIMEOUT_S = 120; /* for all handshakes together */
static const int64_t QUIET_S = 3;          /* a drain ends after this time without a delivery */

/* ---- options -------------------------------------------------------------------------------- */

static struct {
    char mode[16];
    long port[MAX_LIST], pid[MAX_LIST]; /* zero behind the last */
    long listeners, publishers, inflight, size, core, clients, concurrency;
    double rate, warmup, duration, drain, hold;
    char arrivals[8], header[MAX_EXTRA_HEADER];
    long spin, json, deflate, across, browser, tls, resume, v1, channels, watch;
} opt = {.listeners = 400, .publishers = 100, .inflight = 1, .size = 128, .core = -1,
         .clients = 5000, .concurrency = 256, .rate = 200, .warmup = 1, .duration = 5,
         .drain = 20, .hold = 3600, .arrivals = "even", .spin = 1, .channels = -1};

static const struct {
    const char *name;
    long *number;
    double *real;
    long least, most;
    const char *meaning;
} options[] = {
    {"port", opt.port, 0, 1, 65535, "the server's port on 127.0.0.1; or A,B,..."},
    {"listeners", &opt.listeners, 0, 0, MAX_CONNS, "clients that only listen (closed, open)"},
    {"publishers", &opt.publishers, 0, 0, MAX_PUBLISHERS, "clients that also publish"},
    {"inflight", &opt.inflight, 0, 1, 1024, "closed: a publisher's messages under way"},
    {"rate", 0, &opt.rate, 0, 10000000, "open: messages/s in all; probe: pings/s"},
    {"size", &opt.size, 0, STAMPED_BYTES, MAX_SIZE, "payload bytes"},
    {"clients", &opt.clients, 0, 1, MAX_CONNS, "idle, handshakes: connections"},
    {"concurrency", &opt.concurrency, 0, 1, 4096, "handshakes under way at a time"},
    {"warmup", 0, &opt.warmup, 0, MAX_SECONDS, "seconds; handshakes: not measured connections"},
    {"duration", 0, &opt.duration, 0, MAX_SECONDS, "seconds of the measured window"},
    {"drain", 0, &opt.drain, 0, MAX_SECONDS, "seconds at most for what is under way at the end"},
    {"hold", 0, &opt.hold, 0, MAX_SECONDS, "idle, handshakes: seconds at most until stdin closes"},
    {"pid", opt.pid, 0, 1, 1 << 30, "the server's process, for its CPU time; or A,B,..."},
    {"core", &opt.core, 0, -1, 4096, "the server's core, for how busy it was"},
    {"spin", &opt.spin, 0, 0, 1, "1: poll without sleeping"},
    {"json", &opt.json, 0, 0, 1, "1: messages are JSON text behind their stamp, checked in full"},
    {"deflate", &opt.deflate, 0, 0, 1, "1: offer permessage-deflate, and use it where agreed"},
    {"browser", &opt.browser, 0, 0, 1, "1: send the headers of a browser"},
    {"tls", &opt.tls, 0, 0, 1, "1: wss; certificates are not verified, that is the clients' cost"},
    {"resume", &opt.resume, 0, 0, 1, "1: resume the session of the first client"},
    {"v1", &opt.v1, 0, 0, 2, "1: speak relay.v1; 2: listeners only, publishers are plain"},
    {"channels", &opt.channels, 0, -1, 1000, "v1: subscribe to so many; -1: to one by the path"},
    {"watch", &opt.watch, 0, 0, 1, "1: v1: with who is in the channel of the path"},
    {"across", &opt.across, 0, 0, 1, "1: latency from the sending itself, to listeners only"},
};
enum { OPTIONS = sizeof options / sizeof *options };

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "loadgen: ");
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static void usage(void) {
    fprintf(stderr, "usage: loadgen closed|open|idle|handshakes|probe --port N [--name value]\n"
                    "  --arrivals  even|poisson: open: when messages are sent\n"
                    "  --header    a line more in the handshake's request\n");
    for (int i = 0; i < OPTIONS; i++)
        fprintf(stderr, "  --%-11s %s\n", options[i].name, options[i].meaning);
    exit(2);
}

static void set_option(const char *name, const char *value) {
    if (!strcmp(name, "arrivals") && (!strcmp(value, "even") || !strcmp(value, "poisson"))) {
        strcpy(opt.arrivals, value);
        return;
    }
    if (!strcmp(name, "header") && strlen(value) + 3 <= sizeof opt.header) {
        sprintf(opt.header, "%s\r\n", value);
        return;
    }
    for (int i = 0; i < OPTIONS; i++) {
        if (strcmp(options[i].name, name)) continue;
        int may_be_many = options[i].number == opt.port || options[i].number == opt.pid;
        for (int n = 0;; n++, value++) {
            char *end;
            double number = strtod(value, &end);
            if (end == value || number < (double)options[i].least ||
                number > (double)options[i].most)
                usage();
            if (options[i].number) options[i].number[n] = (long)number;
            else *options[i].real = number;
            value = end;
            if (!*value) return;
            if (*value != ',' || !may_be_many || n + 2 == MAX_LIST) usage();
        }
    }
    usage();
}

static void read_options(int argc, char **argv) {
    if (argc < 2 || argc % 2 || strlen(argv[1]) >= sizeof opt.mode) usage();
    strcpy(opt.mode, argv[1]);
    for (int i = 2; i < argc; i += 2) {
        if (strncmp(argv[i], "--", 2)) usage();
        set_option(argv[i] + 2, argv[i + 1]);
    }
    if (!opt.port[0]) usage();
}

/* ---- clocks --------------------------------------------------------------------------------- */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static int64_t seconds_ns(double s) { return (int64_t)(s * 1e9); }

/* The CPU time of a process with all its threads, exact to the nanosecond. */
static int64_t cpu_ns(long pid) {
    clockid_t clock;
    struct timespec t;
    if (clock_getcpuclockid((pid_t)pid, &clock) || clock_gettime(clock, &t)) return 0;
    return t.tv_sec * SECOND + t.tv_nsec;
}

enum { CORE_COLUMNS = 8 }; /* user nice system idle iowait irq softirq steal, in ticks */

static void read_core(long long columns[CORE_COLUMNS]) {
    char line[512], label[16];
    memset(columns, 0, CORE_COLUMNS * sizeof *columns);
    FILE *f = opt.core < 0 ? NULL : fopen("/proc/stat", "r");
    if (!f) return;
    snprintf(label, sizeof label, "cpu%ld ", opt.core);
    while (fgets(line, sizeof line, f)) {
        if (strncmp(line, label, strlen(label))) continue;
        char *at = line + strlen(label);
        for (int i = 0; i < CORE_COLUMNS; i++) columns[i] = strtoll(at, &at, 10);
    }
    fclose(f);
}

/* One measured window: from begin() to end(). */
typedef struct {
    int64_t from, to, cpu_ns[MAX_LIST], own_cpu_ns, idle_ns, deliveries, messages;
    long long core[CORE_COLUMNS];
} Window;

static Window window;
static struct {
    int64_t deliveries, duplicates, reordered, unexpected, damaged, sent, unsent, closed, failed;
    int64_t recvs, bytes, idle_ns, pings, deflated, resumed, notices;
} seen;

static int64_t own_cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

static void window_begin(void) {
    read_core(window.core);
    window.deliveries = seen.deliveries, window.messages = seen.sent;
    window.idle_ns = seen.idle_ns, window.own_cpu_ns = own_cpu_ns();
    window.from = now_ns();
    for (int i = 0; opt.pid[i]; i++) window.cpu_ns[i] = cpu_ns(opt.pid[i]);
}

static void window_end(void) {
    long long core[CORE_COLUMNS];
    for (int i = 0; opt.pid[i]; i++) window.cpu_ns[i] = cpu_ns(opt.pid[i]) - window.cpu_ns[i];
    window.to = now_ns();
    window.own_cpu_ns = own_cpu_ns() - window.own_cpu_ns;
    window.idle_ns = seen.idle_ns - window.idle_ns;
    window.deliveries = seen.deliveries - window.deliveries;
    window.messages = seen.sent - window.messages;
    read_core(core);
    for (int i = 0; i < CORE_COLUMNS; i++) window.core[i] = core[i] - window.core[i];
}

/* Of all servers. */
static double server_cpu_seconds(void) {
    int64_t sum = 0;
    for (int i = 0; opt.pid[i]; i++) sum += window.cpu_ns[i];
    return (double)sum / 1e9;
}

/* ---- connections ---------------------------------------------------------------------------- */

typedef enum { CONNECTING, SECURING, HANDSHAKING, OPEN, CLOSED } State;

typedef struct {
    int fd;
    SSL *tls;
    State state;
    uint32_t id;
    int32_t publisher; /* its number, -1 for a listener */
    int wants_write;
    char accept_key[ACCEPT_CHARS + 1];
    uint8_t *carry; /* the start of a frame (or of the handshake's answer) whose rest is to come */
    size_t carried;
    uint64_t order; /* a hash of all its messages in the order in which they came */
    uint32_t *next; /* by publisher: the sequence number that this client expects */
    int deflate;    /* permessage-deflate was agreed on */
    z_stream *inflater; /* its context, where one message may refer to those before */
    uint64_t inflated;  /* messages that stood alone */
} Conn;

/* What a publisher still has to send. A message keeps the time at which it was due, so that a
 * server that stops reading shows as latency and not as a lower rate. */
typedef struct {
    Conn *conn;
    int64_t due[DUE_MESSAGES];
    unsigned due_head, due_tail;
    uint32_t sequence;
    long under_way;
    uint8_t *frame;
    size_t frame_len, frame_sent;
} Publisher;

static Conn *conns;
static Publisher *publishers;
static long conn_count, open_count, conns_in_all, publisher_count;
static int epoll_fd, timer_fd = -1, publishing;
static size_t carry_bytes;
static uint8_t *input; /* what is carried over, and behind it what recv() brings */
static Histogram latency;

static uint64_t random_state = 0x9e3779b97f4a7c15; /* fixed: every run has the same arrivals */

static uint64_t random_bits(void) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    return random_state ^= random_state << 17;
}

static void interest(Conn *c, uint32_t events, int op) {
    struct epoll_event event = {.events = events, .data.u32 = c->id};
    if (epoll_ctl(epoll_fd, op, c->fd, &event)) die("epoll_ctl: %s", strerror(errno));
}

static void want_write(Conn *c, int wanted) {
    if (c->wants_write == wanted) return;
    c->wants_write = wanted;
    interest(c, wanted ? EPOLLIN | EPOLLOUT : EPOLLIN, EPOLL_CTL_MOD);
}

static SSL_CTX *tls_context;
static SSL_SESSION *tls_session; /* the first that a server has sent */

static int keep_session(SSL *tls, SSL_SESSION *session) {
    (void)tls;
    if (!opt.resume || tls_session) return 0;
    tls_session = session;
    return 1;
}

static void tls_start(void) {
    tls_context = SSL_CTX_new(TLS_client_method());
    if (!tls_context) die("no TLS");
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE |
                                      SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                      SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(tls_context,
                                   SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL_STORE);
    SSL_CTX_sess_set_new_cb(tls_context, keep_session);
}

/* As send() and recv() on a socket that does not block, with TLS or without. */
static ssize_t conn_send(Conn *c, const void *data, size_t len) {
    if (!c->tls) return send(c->fd, data, len, MSG_NOSIGNAL);
    int n = SSL_write(c->tls, data, (int)len);
    if (n > 0) return n;
    int error = SSL_get_error(c->tls, n);
    errno = error == SSL_ERROR_WANT_WRITE || error == SSL_ERROR_WANT_READ ? EAGAIN : EPIPE;
    return -1;
}

static ssize_t conn_recv(Conn *c, void *data, size_t room) {
    if (!c->tls) return recv(c->fd, data, room, 0);
    size_t have = 0;
    while (have < room) {
        int n = SSL_read(c->tls, (uint8_t *)data + have, (int)(room - have));
        if (n > 0) {
            have += (size_t)n;
            continue;
        }
        int error = SSL_get_error(c->tls, n);
        errno = EAGAIN;
        if (error != SSL_ERROR_WANT_READ) return have ? (ssize_t)have : 0;
        break;
    }
    return have ? (ssize_t)have : -1;
}

static void conn_closed(Conn *c) {
    if (c->state == OPEN) open_count--, seen.closed++;
    else seen.failed++;
    c->state = CLOSED;
    if (c->tls) SSL_free(c->tls), c->tls = NULL;
    close(c->fd);
}

/* As Firefox offers it: a server may ask for a smaller window of its own, not of the client's. */
static const char OFFER[] = "Sec-WebSocket-Extensions: permessage-deflate\r\n";

/* As Chrome sends them. */
static const char BROWSER[] =
    "Pragma: no-cache\r\nCache-Control: no-cache\r\n"
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    "Chrome/140.0.0.0 Safari/537.36\r\n"
    "Accept-Encoding: gzip, deflate, br, zstd\r\nAccept-Language: en-US,en;q=0.9\r\n"
    "Cookie: session=0123456789abcdef0123456789abcdef\r\n"
    "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";

#define V1_CHANNEL "bench"

static int speaks_v1(const Conn *c) { return opt.v1 == 1 || (opt.v1 == 2 && c->publisher < 0); }

static const char *path(void) {
    if (!opt.v1 || opt.channels >= 0) return "/";
    return opt.watch ? "/channels/" V1_CHANNEL "?presence=true" : "/channels/" V1_CHANNEL;
}

/* Several servers have equal shares of the clients: the first the first of them, and so on. */
static long port_of(const Conn *c) {
    long count = 0;
    while (opt.port[count]) count++;
    return opt.port[c->id * count / conns_in_all];
}

static void send_request(Conn *c) {
    uint8_t nonce[16];
    char key[KEY_CHARS + 1], request[384 + sizeof BROWSER + MAX_EXTRA_HEADER];
    for (int i = 0; i < 16; i += 8) {
        uint64_t bits = random_bits();
        memcpy(nonce + i, &bits, 8);
    }
    wire_base64(nonce, sizeof nonce, key);
    wire_accept(key, c->accept_key);
    int len = snprintf(request, sizeof request,
                       "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%ld\r\nUpgrade: websocket\r\n"
                       "Connection: Upgrade\r\nSec-WebSocket-Key: %s\r\n"
                       "Origin: %s://127.0.0.1:%ld\r\nSec-WebSocket-Version: 13\r\n%s%s%s%s\r\n",
                       path(), port_of(c), key,
                       opt.tls ? "https" : "http", port_of(c), opt.deflate ? OFFER : "",
                       opt.browser ? BROWSER : "",
                       speaks_v1(c) ? "Sec-WebSocket-Protocol: relay.v1\r\n" : "", opt.header);
    c->state = HANDSHAKING;
    /* A fresh socket's send buffer is empty: a short write can only be a broken connection. */
    if (conn_send(c, request, (size_t)len) != len) conn_closed(c);
}

static void secure(Conn *c) {
    int done = SSL_do_handshake(c->tls);
    seen.resumed += done == 1 && SSL_session_reused(c->tls);
    if (done == 1) send_request(c);
    else if (SSL_get_error(c->tls, done) != SSL_ERROR_WANT_READ) conn_closed(c);
}

/* TCP is connected. */
static void connected(Conn *c) {
    if (!opt.tls) {
        send_request(c);
        return;
    }
    c->state = SECURING;
    c->tls = SSL_new(tls_context);
    if (!c->tls || !SSL_set_fd(c->tls, c->fd)) die("out of memory");
    if (tls_session) { /* a copy: OpenSSL uses each of them once */
        SSL_SESSION *session = SSL_SESSION_dup(tls_session);
        SSL_set_session(c->tls, session);
        SSL_SESSION_free(session);
    }
    SSL_set_connect_state(c->tls);
    secure(c);
}

static void conn_start(Conn *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port_of(c))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    c->state = CONNECTING;
    if (!connect(c->fd, (struct sockaddr *)&address, sizeof address)) {
        interest(c, EPOLLIN, EPOLL_CTL_ADD);
        connected(c);
    } else if (errno == EINPROGRESS) {
        c->wants_write = 1;
        interest(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
    } else {
        conn_closed(c);
    }
}

/* Returns 0 when the server agreed to what was not offered. */
static int take_extensions(Conn *c, const char *head) {
    static const char name[] = "\r\nsec-websocket-extensions:";
    const char *value = strcasestr(head, name);
    if (!value) return 1;
    value += sizeof name - 1;
    const char *end = strchrnul(value, '\r'), *found = strstr(value, "permessage-deflate");
    if (opt.browser && !opt.deflate) return 1; /* no messages follow */
    if (!opt.deflate || !found || found > end) return 0;
    c->deflate = 1;
    found = strstr(found, "server_no_context_takeover");
    if (found && found < end) return 1;
    c->inflater = calloc(1, sizeof *c->inflater);
    if (!c->inflater || inflateInit2(c->inflater, -MAX_WBITS) != Z_OK) die("out of memory");
    return 1;
}

static void send_text(Conn *c, const char *text, size_t len) {
    uint8_t frame[MAX_HEADER + V1_HEADER];
    uint32_t mask = (uint32_t)random_bits();
    size_t header = wire_header(frame, OP_TEXT, len, 1);
    memcpy(frame + header, &mask, 4);
    wire_mask(frame + header + 4, (const uint8_t *)text, len, mask);
    if (conn_send(c, frame, header + 4 + len) < 0) return; /* found out by reading */
}

/* All clients have the same channels. */
static void subscribe(Conn *c) {
    char command[V1_HEADER];
    for (long i = 1; i <= opt.channels; i++) {
        int len = snprintf(command, sizeof command,
                           "{\"type\":\"subscribe\",\"channel\":\"" V1_CHANNEL
                           "-%ld\",\"id\":%ld}\n", i, i);
        send_text(c, command, (size_t)len);
    }
}

/* Returns the bytes of the answer's head, 0 while it is not all there, -1 when it is not a 101. */
static ssize_t take_answer(Conn *c, uint8_t *p, size_t have) {
    static const char name[] = "sec-websocket-accept:";
    uint8_t *end = memmem(p, have, "\r\n\r\n", 4);
    if (!end) return 0;
    *end = 0;
    char *value = strcasestr((char *)p, name);
    if (strncmp((char *)p, "HTTP/1.1 101", 12) || !value) return -1;
    value += sizeof name - 1;
    while (*value == ' ') value++;
    if (strncmp(value, c->accept_key, ACCEPT_CHARS) || !take_extensions(c, (char *)p)) return -1;
    c->state = OPEN;
    open_count++;
    if (speaks_v1(c) && opt.channels > 0) subscribe(c);
    return end + 4 - p;
}

/* ---- messages ------------------------------------------------------------------------------- */

/* 32 bits as eight characters '`'..'o', four bits each: plain text, and no table to look up. */
static inline uint64_t spread(uint32_t value) {
    uint64_t x = value;
    x = (x | x << 16) & 0x0000ffff0000ffff;
    x = (x | x << 8) & 0x00ff00ff00ff00ff;
    x = (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
    return x | 0x6060606060606060;
}

static inline uint32_t gather(uint64_t x) {
    x &= 0x0f0f0f0f0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff00ff00ff;
    x = (x | x >> 8) & 0x0000ffff0000ffff;
    return (uint32_t)(x | x >> 16);
}

static inline uint64_t load64(const uint8_t *p) {
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

static uint8_t filler(uint32_t publisher) { return (uint8_t)('A' + publisher % 26); }

/* What JSON messages hold behind their stamp: rows of a feed, other ones in each. */
static uint8_t *bodies;

static size_t body_bytes(void) { return (size_t)opt.size - STAMPED_BYTES; }

static const uint8_t *body(uint32_t publisher, uint32_t sequence) {
    return bodies + (publisher * 7 + sequence) % BODIES * body_bytes();
}

static const char *one_of(const char *const words[], size_t count) {
    return words[random_bits() % count];
}

static void write_rows(uint8_t *out, size_t len) {
    static const char *const names[] = {"Amara", "Boris", "Chen", "Dilan", "Elif", "Farid", "Greta",
                                        "Hiro", "Ines", "Jonas", "Katya", "Liam", "Mira", "Noor"};
    static const char *const events[] = {"order.created", "order.updated", "payment.settled",
                                         "shipment.left", "shipment.arrived", "ticket.closed"};
    static const char *const places[] = {"Berlin", "Lagos", "Lima", "Oslo", "Pune", "Seoul"};
    static const char *const words[] = {
        "the",   "parcel", "was",   "left",  "with",  "a",       "neighbour", "customer", "asks",
        "for",   "another", "date", "and",   "paid",  "by",      "card",      "not",      "yet",
        "ready", "to",     "leave", "store", "please", "call",   "before",    "noon",     "today"};
#define ONE_OF(list) one_of(list, sizeof list / sizeof *list)
    for (size_t at = 0; at < len;) {
        char row[512];
        uint64_t a = random_bits(), b = random_bits();
        int n = snprintf(row, sizeof row,
                         "{\"id\":\"%08x-%04x\",\"at\":\"2026-%02d-%02dT%02d:%02d:%02d.%03dZ\","
                         "\"event\":\"%s\",\"user\":{\"id\":%u,\"name\":\"%s\"},\"city\":\"%s\","
                         "\"amount\":%u.%02u,\"items\":%u,\"note\":\"",
                         (uint32_t)a, (uint32_t)(a >> 32 & 0xffff), (int)(a >> 48) % 12 + 1,
                         (int)(a >> 52) % 28 + 1, (int)(b & 15) + 8, (int)(b >> 4 & 63) % 60,
                         (int)(b >> 10 & 63) % 60, (int)(b >> 16 & 1023) % 1000, ONE_OF(events),
                         (uint32_t)(b >> 26 & 0x1ffff), ONE_OF(names), ONE_OF(places),
                         (uint32_t)(b >> 43 & 511), (uint32_t)(b >> 52) % 100,
                         (uint32_t)(b >> 60) + 1);
        for (uint64_t left = 4 + random_bits() % 8; left--;)
            n += snprintf(row + n, sizeof row - (size_t)n, "%s%s", ONE_OF(words), left ? " " : "");
        n += snprintf(row + n, sizeof row - (size_t)n, "\"},");
        size_t taken = (size_t)n < len - at ? (size_t)n : len - at;
        memcpy(out + at, row, taken);
        at += taken;
    }
}

static z_stream deflater;

static size_t deflate_message(uint8_t *out, size_t room, const uint8_t *payload) {
    deflateReset(&deflater);
    deflater.next_in = payload, deflater.avail_in = (uInt)opt.size;
    deflater.next_out = out, deflater.avail_out = (uInt)room;
    if (deflate(&deflater, Z_SYNC_FLUSH) != Z_OK || !deflater.avail_out) die("deflate failed");
    return room - deflater.avail_out - 4; /* without the flush's own four: RFC 7692, 7.2.1 */
}

static void build_message(Publisher *p, int64_t stamp) {
    static uint8_t framed[V1_HEADER + MAX_SIZE], packed[2 * MAX_SIZE];
    uint8_t *plain = framed;
    if (speaks_v1(p->conn)) /* the ids of a session only grow, from 1 */
        plain += sprintf((char *)framed,
                         "{\"type\":\"publish\",\"channel\":\"" V1_CHANNEL "\",\"id\":%u}\n",
                         p->sequence + 1);
    const uint8_t *payload = plain;
    size_t len = (size_t)opt.size;
    uint32_t number = (uint32_t)p->conn->publisher, mask = (uint32_t)random_bits();
    uint64_t words[4] = {spread(number), spread(p->sequence), spread((uint32_t)(stamp >> 32)),
                         spread((uint32_t)stamp)};
    memcpy(plain, words, sizeof words);
    if (opt.json) memcpy(plain + STAMPED_BYTES, body(number, p->sequence), body_bytes());
    else memset(plain + STAMPED_BYTES, filler(number), body_bytes());
    p->sequence++;
    if (p->conn->deflate) len = deflate_message(packed, sizeof packed, plain), payload = packed;
    if (speaks_v1(p->conn)) payload = framed, len += (size_t)(plain - framed);
    size_t header = wire_header(p->frame, OP_TEXT, len, 1);
    if (p->conn->deflate) p->frame[0] |= RSV1;
    memcpy(p->frame + header, &mask, 4);
    wire_mask(p->frame + header + 4, payload, len, mask);
    p->frame_len = header + 4 + len;
    p->frame_sent = 0;
    seen.sent++;
}

/* Sends what is due until the socket is full. Closed loop: a message is due when one is done. */
static void pump(Publisher *p) {
    int closed_loop = opt.mode[0] == 'c';
    while (p->conn->state == OPEN) {
        if (p->frame_sent < p->frame_len) {
            ssize_t n = conn_send(p->conn, p->frame + p->frame_sent,
                                  p->frame_len - p->frame_sent);
            if (n < 0 && errno != EAGAIN) return; /* the read that follows finds out */
            if (n > 0) p->frame_sent += (size_t)n;
            if (p->frame_sent < p->frame_len) {
                want_write(p->conn, 1);
                return;
            }
        } else if (closed_loop && publishing && p->under_way < opt.inflight) {
            p->under_way++;
            build_message(p, now_ns());
        } else if (!closed_loop && p->due_head != p->due_tail) {
            int64_t due = p->due[p->due_head++ % DUE_MESSAGES];
            build_message(p, opt.across ? now_ns() : due);
        } else {
            break;
        }
    }
    if (p->conn->state == OPEN) want_write(p->conn, 0);
}

static void make_due(Publisher *p, int64_t stamp) {
    if (p->due_tail - p->due_head == DUE_MESSAGES) seen.unsent++;
    else p->due[p->due_tail++ % DUE_MESSAGES] = stamp;
    pump(p);
}

/* Sequence numbers that were skipped, so that a late message can be told from a second copy. */
static struct Gap {
    uint32_t conn, publisher, from, to;
} gaps[MAX_GAPS];
static int gap_count, gaps_overflowed;

static void out_of_sequence(Conn *c, uint32_t publisher, uint32_t sequence) {
    uint32_t *next = &c->next[publisher];
    if (sequence > *next) {
        if (gap_count < MAX_GAPS)
            gaps[gap_count++] = (struct Gap){c->id, publisher, *next, sequence};
        else gaps_overflowed = 1;
        *next = sequence + 1;
        return;
    }
    for (int i = 0; i < gap_count; i++) {
        struct Gap *g = &gaps[i];
        if (g->conn != c->id || g->publisher != publisher || sequence < g->from ||
            sequence >= g->to)
            continue;
        if (gap_count < MAX_GAPS)
            gaps[gap_count++] = (struct Gap){c->id, publisher, sequence + 1, g->to};
        g->to = sequence;
        seen.reordered++;
        return;
    }
    seen.duplicates++;
    seen.deliveries--; /* a second copy delivers nothing */
}

/* Whether a payload is what its publisher sent, as far as its stamp and what is behind it tell. */
static inline int intact(const uint8_t *p) {
    uint32_t publisher = gather(load64(p)), sequence = gather(load64(p + 8));
    if (publisher >= (uint32_t)publisher_count) return 0;
    if (opt.json) return !memcmp(p + STAMPED_BYTES, body(publisher, sequence), body_bytes());
    return opt.size == STAMPED_BYTES || p[opt.size - 1] == filler(publisher);
}

/* The hot path: one message at one client, by its stamp. */
static inline void message(Conn *c, const uint8_t *p, int64_t now) {
    uint32_t publisher = gather(load64(p)), sequence = gather(load64(p + 8));
    if (publisher >= (uint32_t)publisher_count) return; /* counted as damaged */
    seen.deliveries++;
    c->order = (c->order ^ ((uint64_t)publisher << 32 | sequence)) * 0x9e3779b97f4a7c15;
    if (c->next[publisher] == sequence) c->next[publisher]++;
    else out_of_sequence(c, publisher, sequence);
    int64_t stamp = (int64_t)((uint64_t)gather(load64(p + 16)) << 32 | gather(load64(p + 24)));
    /* By the stamp, not by the arrival: what is slow at the end of the window counts as well. */
    if (window.from && stamp >= window.from && (!window.to || stamp < window.to) &&
        (!opt.across || c->publisher < 0))
        hist_add(&latency, now - stamp);
    if ((int32_t)publisher == c->publisher) publishers[publisher].under_way--;
}

/* Messages as they came deflated, with what they were found to be. All clients see one order, so
 * the n-th of one client is the n-th of all; where it is not, it is only inflated again. */
typedef struct {
    size_t len;
    int intact;
    uint8_t stamped[STAMPED_BYTES], *deflated;
} Known;

static Known known[KNOWN];

/* Inflates a message to `out`. What is no whole message of the right size leaves there a stamp of
 * nobody, which is not intact. */
static void inflate_message(z_stream *z, const uint8_t *p, size_t len, uint8_t *out) {
    static const uint8_t tail[] = {0, 0, 0xff, 0xff}; /* RFC 7692, 7.2.2 */
    z->next_out = out, z->avail_out = (uInt)opt.size + 1;
    z->next_in = p, z->avail_in = (uInt)len;
    int first = inflate(z, Z_SYNC_FLUSH), left = (int)z->avail_in;
    z->next_in = tail, z->avail_in = sizeof tail;
    int second = inflate(z, Z_SYNC_FLUSH);
    if (first != Z_OK || left || (second != Z_OK && second != Z_BUF_ERROR) || z->avail_in ||
        z->avail_out != 1)
        memset(out, 0xff, STAMPED_BYTES);
}

static void learn(Known *k, const uint8_t *p, size_t len) {
    static z_stream inflater;
    static uint8_t plain[MAX_SIZE + 1];
    if (!inflater.state && inflateInit2(&inflater, -MAX_WBITS) != Z_OK) die("out of memory");
    inflateReset(&inflater);
    inflate_message(&inflater, p, len, plain);
    k->len = len;
    memcpy(k->deflated, p, len);
    k->intact = intact(plain);
    memcpy(k->stamped, plain, sizeof k->stamped);
}

static void deflated_message(Conn *c, const uint8_t *p, size_t len, int64_t now) {
    seen.deflated++;
    if (c->inflater) {
        static uint8_t plain[MAX_SIZE + 1];
        inflate_message(c->inflater, p, len, plain);
        seen.damaged += !intact(plain);
        message(c, plain, now);
    } else {
        Known *k = &known[c->inflated++ % KNOWN];
        if (k->len != len || memcmp(k->deflated, p, len)) learn(k, p, len);
        seen.damaged += !k->intact;
        message(c, k->stamped, now);
    }
}

static void send_control(Conn *c, int opcode, const uint8_t *payload, size_t len) {
    uint8_t frame[MAX_HEADER + MAX_CONTROL];
    uint32_t mask = (uint32_t)random_bits();
    Publisher *p = c->publisher >= 0 ? &publishers[c->publisher] : NULL;
    if (p && p->frame_sent && p->frame_sent < p->frame_len) return; /* never inside a frame */
    size_t header = wire_header(frame, opcode, len, 1);
    memcpy(frame + header, &mask, 4);
    wire_mask(frame + header + 4, payload, len, mask);
    if (conn_send(c, frame, header + 4 + len) < 0) return; /* found out by reading */
}

static void pong_received(const uint8_t *payload, size_t len, int64_t now);

/* Returns 0 when the connection ends. */
static int control(Conn *c, int opcode, const uint8_t *payload, uint64_t len, int64_t now) {
    if (len > MAX_CONTROL) return 0;
    if (opcode == OP_PING) {
        seen.pings++;
        send_control(c, OP_PONG, payload, (size_t)len);
        return 1;
    }
    if (opcode == OP_PONG) {
        pong_received(payload, (size_t)len, now);
        return 1;
    }
    if (opcode == OP_CLOSE) send_control(c, OP_CLOSE, payload, (size_t)len);
    else seen.unexpected++;
    return 0;
}

/* A message of relay.v1 behind its header. Notices are the relay's own, and have a type. */
static void headed_message(Conn *c, const uint8_t *p, uint64_t len, int64_t now) {
    static const char channel[] = "{\"channel\":\"" V1_CHANNEL "\",\"position\":\"";
    const uint8_t *end = memchr(p, '\n', len);
    if (!end) seen.unexpected++;
    else if (len < sizeof channel - 1 || memcmp(p, channel, sizeof channel - 1)) seen.notices++;
    else if ((uint64_t)(p + len - end - 1) != (uint64_t)opt.size) seen.unexpected++;
    else seen.damaged += !intact(end + 1), message(c, end + 1, now);
}

/* Walks the frames in place. Returns the bytes of the unfinished last one, -1 at the end. */
static ssize_t walk(Conn *c, uint8_t *p, size_t have, int64_t now) {
    for (;;) {
        int opcode, masked;
        uint64_t len;
        size_t header = wire_parse(p, have, &opcode, &len, &masked);
        if (header && (masked || len > MAX_SIZE)) return -1;
        if (!header || have < header + len) return (ssize_t)have;
        if (p[0] == TEXT_FRAME && speaks_v1(c)) {
            headed_message(c, p + header, len, now);
        } else if (p[0] == TEXT_FRAME && len == (uint64_t)opt.size) {
            seen.damaged += !intact(p + header);
            message(c, p + header, now);
        } else if (p[0] == DEFLATED_FRAME && c->deflate && header + len <= carry_bytes) {
            deflated_message(c, p + header, (size_t)len, now);
        } else if (!control(c, opcode, p + header, len, now)) {
            return -1;
        }
        p += header + len, have -= header + (size_t)len;
    }
}

static void readable(Conn *c) {
    if (c->state == SECURING) {
        secure(c);
        return;
    }
    if (c->carried) memcpy(input, c->carry, c->carried);
    ssize_t n = conn_recv(c, input + c->carried, READ_BYTES);
    if (n <= 0) {
        if (n == 0 || (errno != EAGAIN && errno != EINTR)) conn_closed(c);
        return;
    }
    seen.recvs++, seen.bytes += n;
    uint8_t *p = input;
    size_t have = c->carried + (size_t)n;
    ssize_t left = (ssize_t)have;
    if (c->state == HANDSHAKING) {
        ssize_t head = take_answer(c, p, have);
        if (head > 0) p += head, have -= (size_t)head;
        else left = head < 0 ? -1 : left;
    }
    if (c->state == OPEN) left = walk(c, p, have, now_ns());
    if (left < 0 || (size_t)left > carry_bytes) {
        conn_closed(c);
        return;
    }
    c->carried = (size_t)left;
    if (left) memcpy(c->carry, p + have - left, (size_t)left);
    if (c->publisher >= 0) pump(&publishers[c->publisher]);
    if (c->tls && SSL_pending(c->tls)) readable(c); /* no event follows for these bytes */
}

static void writable(Conn *c) {
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t len = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &len);
        if (error) {
            conn_closed(c);
            return;
        }
        want_write(c, 0);
        connected(c);
    } else if (c->publisher >= 0) {
        pump(&publishers[c->publisher]);
    }
}

/* ---- the loop ------------------------------------------------------------------------------- */

enum { TIMER_ID = MAX_CONNS, STDIN_ID };
static int stdin_closed;

static void set_timer(int64_t at) {
    struct itimerspec when = {.it_value = {.tv_sec = at / SECOND, .tv_nsec = at % SECOND}};
    timerfd_settime(timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

static void drain_stdin(void) {
    char ignored[256];
    if (read(STDIN_FILENO, ignored, sizeof ignored) > 0) return;
    stdin_closed = 1;
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
}

/* One turn of the loop. Without spinning it sleeps until something arrives or `until` has come. */
static int64_t turn(int64_t until) {
    static struct epoll_event events[MAX_EVENTS];
    int64_t before = now_ns();
    if (!opt.spin) set_timer(until > before ? until : before + 1);
    int n = epoll_wait(epoll_fd, events, MAX_EVENTS, opt.spin ? 0 : -1);
    int64_t after = now_ns();
    if (n <= 0 || !opt.spin) seen.idle_ns += after - before;
    for (int i = 0; i < n; i++) {
        uint32_t id = events[i].data.u32;
        if (id == STDIN_ID) {
            drain_stdin();
        } else if (id == TIMER_ID) {
            uint64_t expirations;
            if (read(timer_fd, &expirations, sizeof expirations) < 0) continue;
        } else {
            Conn *c = &conns[id];
            if (c->state != CLOSED && events[i].events & EPOLLOUT) writable(c);
            if (c->state != CLOSED && events[i].events & ~(uint32_t)EPOLLOUT) readable(c);
        }
    }
    return after;
}

static void watch_extra(int fd, uint32_t id) {
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = id};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event); /* a stdin that is a file cannot be watched */
}

static void allocate(long count, long publisher_total) {
    struct rlimit limit;
    if (count > MAX_CONNS) die("at most %d connections", MAX_CONNS);
    if (getrlimit(RLIMIT_NOFILE, &limit)) die("getrlimit: %s", strerror(errno));
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (deflateInit2(&deflater, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -MAX_WBITS, 8,
                     Z_DEFAULT_STRATEGY) != Z_OK)
        die("out of memory");
    carry_bytes = opt.deflate ? deflateBound(&deflater, (uLong)opt.size) : (size_t)opt.size;
    carry_bytes += MAX_HEADER + V1_HEADER;
    if (carry_bytes < MIN_CARRY) carry_bytes = MIN_CARRY;
    if (opt.tls) tls_start();
    publisher_count = publisher_total;
    conns_in_all = count;
    conns = calloc((size_t)count, sizeof *conns);
    publishers = calloc((size_t)publisher_total + 1, sizeof *publishers);
    input = malloc(carry_bytes + READ_BYTES);
    uint32_t *next = calloc((size_t)(count * (publisher_total + 1)), sizeof *next);
    uint8_t *carry = calloc((size_t)count, carry_bytes);
    uint8_t *frames = calloc((size_t)publisher_total + 1, carry_bytes);
    if (!conns || !publishers || !input || !next || !carry || !frames) die("out of memory");
    bodies = calloc(BODIES, body_bytes());
    uint8_t *deflated = calloc(KNOWN, carry_bytes);
    if (!bodies || !deflated) die("out of memory");
    write_rows(bodies, BODIES * body_bytes());
    for (size_t i = 0; i < KNOWN; i++) known[i].deflated = deflated + i * carry_bytes;
    for (long i = 0; i < count; i++) {
        conns[i] = (Conn){.fd = -1, .id = (uint32_t)i, .publisher = -1, .state = CLOSED};
        conns[i].next = next + i * (publisher_total + 1);
        conns[i].carry = carry + (size_t)i * carry_bytes;
    }
    /* Publishers stand among the listeners at even distances, a single one in the middle: whom a
     * server serves first favours nobody. */
    for (long i = 0; i < publisher_total; i++) {
        Conn *c = &conns[(2 * i + 1) * count / (2 * publisher_total)];
        c->publisher = (int32_t)i;
        publishers[i].conn = c;
        publishers[i].frame = frames + (size_t)i * carry_bytes;
    }
    epoll_fd = epoll_create1(0);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    watch_extra(timer_fd, TIMER_ID);
    watch_extra(STDIN_FILENO, STDIN_ID);
}

/* Opens connections up to `count`, at most --concurrency handshakes at a time. */
static void open_until(long count) {
    int64_t deadline = now_ns() + OPEN_TIMEOUT_S * SECOND;
    while (open_count + seen.closed + seen.failed < count) {
        while (conn_count < count &&
               conn_count - open_count - seen.closed - seen.failed < opt.concurrency)
            conn_start(&conns[conn_count++]);
        if (turn(deadline) > deadline) die("%ld of %ld connected in time", open_count, count);
    }
}

static void report_open(void) {
    printf("{\"event\":\"open\",\"clients\":%ld,\"failed\":%" PRId64 "}\n", open_count,
           seen.failed);
    fflush(stdout);
}

static void print_latency(const char *name, const Histogram *h) {
    printf(",\"%s\":{\"samples\":%" PRIu64 ",\"mean\":%.9f,\"p50\":%.9f,\"p90\":%.9f,"
           "\"p99\":%.9f,\"p999\":%.9f,\"max\":%.9f}",
           name, h->total, h->total ? h->sum / (double)h->total / 1e9 : 0,
           (double)hist_quantile(h, .5) / 1e9, (double)hist_quantile(h, .9) / 1e9,
           (double)hist_quantile(h, .99) / 1e9, (double)hist_quantile(h, .999) / 1e9,
           (double)h->max / 1e9);
}

/* What neither the server nor this process used of its core: other programs were at work. The
 * server's core is counted in ticks, too coarse for a short window. */
static void print_foreign(double seconds, double server_core_busy) {
    double server = server_core_busy - server_cpu_seconds() / seconds;
    double client = 1 - (double)window.own_cpu_ns / 1e9 / seconds;
    printf(",\"server_core_foreign\":%.4f,\"client_core_foreign\":%.4f",
           opt.pid[0] && seconds > 0.5 && server > 0 ? server : 0.0, opt.spin ? client : 0.0);
}

static void print_window(void) {
    double seconds = (double)(window.to - window.from) / 1e9;
    long long *core = window.core, all = 0, idle = core[3] + core[4];
    for (int i = 0; i < CORE_COLUMNS; i++) all += core[i];
    double total = all ? (double)all : 1, busy = (double)(all - idle - core[7]) / total;
    printf(",\"seconds\":%.9f,\"server_cpu_seconds\":%.9f,\"client_cpu_seconds\":%.9f,"
           "\"client_busy\":%.4f,\"server_core_busy\":%.4f,\"server_core_softirq\":%.4f,"
           "\"server_core_stolen\":%.4f",
           seconds, server_cpu_seconds(), (double)window.own_cpu_ns / 1e9,
           1 - (double)window.idle_ns / 1e9 / seconds, busy, (double)core[6] / total,
           (double)core[7] / total);
    print_foreign(seconds, busy);
    printf(",\"cpu_seconds\":[");
    for (int i = 0; opt.pid[i]; i++)
        printf("%s%.9f", i ? "," : "", (double)window.cpu_ns[i] / 1e9);
    printf("]");
}

/* ---- closed and open loop ------------------------------------------------------------------- */

typedef struct {
    int64_t at;
    uint64_t index;
} Schedule;

/* Poisson: independent publishers fall together now and then, as they do in life. */
static int64_t interval_ns(void) {
    double mean = 1e9 / opt.rate;
    if (opt.arrivals[0] == 'e') return (int64_t)mean;
    double uniform = (double)(random_bits() >> 11) * 0x1p-53;
    return (int64_t)(-mean * __builtin_log(1 - uniform));
}

static void send_due(Schedule *s, int64_t now) {
    while (publishing && s->at <= now) {
        make_due(&publishers[s->index++ % (uint64_t)publisher_count], s->at);
        s->at += interval_ns();
    }
}

static int64_t expected(void) { return seen.sent * conn_count; }

static void run_until(Schedule *s, int64_t end) {
    for (int64_t now = now_ns(); now < end;) {
        if (s) send_due(s, now);
        now = turn(s && s->at < end ? s->at : end);
    }
}

static int64_t waiting(void) {
    int64_t count = 0;
    for (long i = 0; i < publisher_count; i++) {
        Publisher *p = &publishers[i];
        if (p->conn->state == OPEN)
            count += (p->frame_sent < p->frame_len) + (p->due_tail - p->due_head);
    }
    return count;
}

/* Waits for all that is under way, as long as something still arrives. Returns 1 if all came. */
static int drain_all(void) {
    int64_t end = now_ns() + seconds_ns(opt.drain), last = now_ns(), received = seen.deliveries;
    while (waiting() || seen.deliveries < expected()) {
        int64_t now = turn(now_ns() + SECOND / 100);
        if (seen.deliveries != received) received = seen.deliveries, last = now;
        if (now > end || now > last + QUIET_S * SECOND) return 0;
    }
    return 1;
}

/* Whatever arrives after all have everything is a second copy, and worth knowing of. */
static void linger(void) { run_until(NULL, now_ns() + SECOND / 10); }

/* All clients were there before the first message: in one order for all, the hashes are equal. */
static long differently_ordered(void) {
    long count = 0;
    for (long i = 1; i < conn_count; i++) count += conns[i].order != conns[0].order;
    return count;
}

/* What became of every message, warm-up and drain included. */
static void print_books(int drained) {
    printf(",\"sent\":%" PRId64 ",\"expected\":%" PRId64 ",\"received\":%" PRId64
           ",\"lost\":%" PRId64 ",\"duplicated\":%" PRId64 ",\"out_of_order\":%" PRId64,
           seen.sent, expected(), seen.deliveries, expected() - seen.deliveries, seen.duplicates,
           seen.reordered);
    printf(",\"differently_ordered\":%ld,\"damaged\":%" PRId64 ",\"unexpected\":%" PRId64
           ",\"unsent\":%" PRId64 ",\"closed\":%" PRId64,
           differently_ordered(), seen.damaged, seen.unexpected, seen.unsent, seen.closed);
    printf(",\"drained\":%s,\"order_exact\":%s,\"recvs\":%" PRId64 ",\"bytes\":%" PRId64
           ",\"deflated\":%" PRId64 ",\"notices\":%" PRId64 "}\n",
           drained ? "true" : "false", gaps_overflowed ? "false" : "true", seen.recvs, seen.bytes,
           seen.deflated, seen.notices);
}

static void run_messages(void) {
    long count = opt.listeners + opt.publishers;
    if (!opt.publishers) die("a publisher is needed");
    allocate(count, opt.publishers);
    open_until(count);
    report_open();
    if (open_count < count) die("%" PRId64 " handshakes failed", seen.failed);
    Schedule schedule = {.at = now_ns()}, *s = opt.mode[0] == 'o' ? &schedule : NULL;
    publishing = 1;
    for (long i = 0; i < publisher_count && !s; i++) pump(&publishers[i]);
    run_until(s, now_ns() + seconds_ns(opt.warmup));
    window_begin();
    run_until(s, window.from + seconds_ns(opt.duration));
    window_end();
    publishing = 0;
    int drained = drain_all();
    linger();
    double seconds = (double)(window.to - window.from) / 1e9, cpu = server_cpu_seconds();
    printf("{\"mode\":\"%s\",\"clients\":%ld,\"publishers\":%ld,\"size\":%ld", opt.mode, count,
           publisher_count, opt.size);
    print_window();
    printf(",\"messages\":%" PRId64 ",\"deliveries\":%" PRId64 ",\"messages_per_s\":%.1f,"
           "\"deliveries_per_s\":%.1f,\"deliveries_per_cpu_s\":%.1f",
           window.messages, window.deliveries, (double)window.messages / seconds,
           (double)window.deliveries / seconds, cpu > 0 ? (double)window.deliveries / cpu : 0);
    print_latency("latency", &latency);
    print_books(drained);
}

/* ---- idle and handshakes -------------------------------------------------------------------- */

static void hold(void) {
    int64_t end = now_ns() + seconds_ns(opt.hold);
    opt.spin = 0;
    while (!stdin_closed && now_ns() < end) turn(end);
}

static void run_idle(void) {
    opt.spin = 0;
    allocate(opt.clients, 0);
    open_until(opt.clients);
    report_open();
    hold();
    printf("{\"mode\":\"idle\",\"clients\":%ld,\"failed\":%" PRId64 ",\"closed\":%" PRId64
           ",\"pings\":%" PRId64 "}\n",
           opt.clients, seen.failed, seen.closed, seen.pings);
}

/* The warm-up's connections stay open too: they let a server import, compile and grow first. */
static void run_handshakes(void) {
    long warm = (long)opt.warmup;
    allocate(warm + opt.clients, 0);
    open_until(warm);
    run_until(NULL, now_ns() + SECOND / 5);
    window_begin();
    open_until(warm + opt.clients);
    window_end();
    report_open();
    if (seen.failed) die("%" PRId64 " handshakes failed", seen.failed);
    hold();
    long arrived = open_count + (long)seen.closed - warm;
    double seconds = (double)(window.to - window.from) / 1e9, cpu = server_cpu_seconds();
    printf("{\"mode\":\"handshakes\",\"clients\":%ld,\"arrived\":%ld,\"failed\":%" PRId64
           ",\"closed\":%" PRId64 ",\"resumed\":%" PRId64,
           opt.clients, arrived, seen.failed, seen.closed, seen.resumed);
    print_window();
    printf(",\"handshakes_per_s\":%.1f,\"handshakes_per_cpu_s\":%.1f}\n",
           (double)arrived / seconds, cpu > 0 ? (double)arrived / cpu : 0);
}

/* ---- the probe ------------------------------------------------------------------------------ */

static struct {
    uint64_t sent, answered;
    int64_t due[PENDING_PINGS], worst[MAX_SECONDS], start;
} probe;

/* A pong answers its own ping and all before it (RFC 6455, 5.5.3). */
static void pong_received(const uint8_t *payload, size_t len, int64_t now) {
    uint64_t index;
    if (len != sizeof index || !probe.start) return;
    memcpy(&index, payload, sizeof index);
    for (; probe.answered <= index && probe.answered < probe.sent; probe.answered++) {
        int64_t due = probe.due[probe.answered % PENDING_PINGS];
        int64_t second = (due - probe.start) / SECOND, took = now - due;
        hist_add(&latency, took);
        if (second < MAX_SECONDS && took > probe.worst[second]) probe.worst[second] = took;
    }
}

static const char *raise_priority(void) {
    struct sched_param first = {.sched_priority = 1};
    if (!sched_setscheduler(0, SCHED_FIFO, &first)) return "fifo";
    return setpriority(PRIO_PROCESS, 0, -20) ? "none" : "nice";
}

/* Pings by schedule, each measured from its due time: what a stall delays is seen in full. It
 * sleeps between pings and goes before the other clients on its core, so that their reading is
 * not mistaken for the server's stall. */
static void run_probe(void) {
    const char *priority = raise_priority();
    opt.spin = 0;
    allocate(1, 0);
    open_until(1);
    report_open();
    probe.start = now_ns() + SECOND / 10;
    int64_t step = (int64_t)(1e9 / opt.rate), due = probe.start;
    int64_t end = probe.start + seconds_ns(opt.duration), give_up = end + QUIET_S * SECOND;
    for (int64_t now = now_ns(); now < give_up && conns[0].state == OPEN;) {
        for (; due <= now && due < end; due += step, probe.sent++) {
            if (probe.sent - probe.answered == PENDING_PINGS) die("too many pings unanswered");
            probe.due[probe.sent % PENDING_PINGS] = due;
            send_control(&conns[0], OP_PING, (uint8_t *)&probe.sent, sizeof probe.sent);
        }
        if (due >= end && probe.answered == probe.sent) break;
        now = turn(due < end ? due : give_up);
    }
    printf("{\"mode\":\"probe\",\"priority\":\"%s\",\"pings\":%" PRIu64 ",\"unanswered\":%" PRIu64,
           priority, probe.sent, probe.sent - probe.answered);
    print_latency("pong", &latency);
    printf(",\"worst_by_second\":[");
    for (int64_t i = 0; i < (int64_t)opt.duration; i++)
        printf("%s%.9f", i ? "," : "", (double)probe.worst[i] / 1e9);
    printf("]}\n");
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(opt.mode, "closed") || !strcmp(opt.mode, "open")) run_messages();
    else if (!strcmp(opt.mode, "idle")) run_idle();
    else if (!strcmp(opt.mode, "handshakes")) run_handshakes();
    else if (!strcmp(opt.mode, "probe")) run_probe();
    else usage();
    return 0;
}
