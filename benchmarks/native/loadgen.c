/*
 * Kong's side of both plugin protocols, as a load: N events in flight over a pool of sockets, the
 * one used last first; a frame's length and its body are two sends; one recv for each readiness.
 * Every value and every sequence number is checked, and one mistake ends the program.
 *
 * ProtoBuf:1 is one conversation on one socket for each event, MsgPack:1 a request and its response
 * on whatever socket is on top of the pool, and again for each step (pb_rpc.lua, mp_rpc.lua of 3.9.1).
 *
 *     loadgen --socket PATH --tokens FILE [options]     prints one line of JSON; see usage()
 */
#define _GNU_SOURCE
#include "common.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>

#define RECV_BYTES 16384
#define STUCK_MS 30000
#define MAX_PIDS 64

struct event {
    struct event *next_free;
    struct token *token;
    uint64_t sequence, started_ns, event_id;
    int sets, calls, vanish_at;
};

enum awaiting { NOTHING, METHOD, ARGUMENT, RETURN, RESPONSE };

struct peer {
    int fd, used;
    struct event *event;
    enum awaiting awaiting;
    char method[64];
    size_t size, room;
    char *buffer;
};

static struct {
    const char *socket, *tokens, *config, *plugin;
    int msgpack, sockets, idle;
    double seconds, warmup, rate;
    long events, warmup_events, vanish_every;
} options = {.config = "{}", .plugin = "bench", .sockets = 16, .seconds = 1.0};

static struct tokens tokens;
static size_t next_token;
static struct peer **pool;
static size_t pooled, pool_room;
static struct event *free_events;
static int epoll, in_flight, limit, fresh;
static uint64_t paced_from, last_arrival;
static double begun;
static uint64_t sequence, instance_id;
static clockid_t clocks[MAX_PIDS];
static int clock_count;

/* Counters of the measured window. */
static struct {
    long events, exits, vanished, connects, calls;
} count;
static long ended, vanish_turn;

/* --- time --------------------------------------------------------------------------------- */

static uint64_t read_clock(clockid_t clock)
{
    struct timespec now;
    if (clock_gettime(clock, &now) != 0)
        die("a server process is gone");
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t now_ns(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

static uint64_t server_cpu_ns(void)
{
    uint64_t total = 0;
    for (int i = 0; i < clock_count; i++)
        total += read_clock(clocks[i]);
    return total;
}

/* Logarithmic buckets, 64 for each power of two: within 1.6 % of the true value. */
static long histogram[64 * 64];

static void note_latency(uint64_t ns)
{
    int power = 63 - __builtin_clzll(ns | 64);
    histogram[(power - 6) * 64 + (int)((ns >> (power - 6)) & 63)]++;
}

static double percentile_us(double part)
{
    long wanted = (long)((double)count.events * part), seen = 0;
    for (int i = 0; i < 64 * 64; i++)
        if ((seen += histogram[i]) > wanted)
            return (double)((64 + (uint64_t)(i % 64)) << (i / 64)) / 1000.0;
    return 0;
}

/* --- sockets ------------------------------------------------------------------------------ */

static void release(struct peer *peer)
{
    if (pooled == pool_room) {
        pool_room = pool_room * 2 + 64;
        pool = must(realloc(pool, pool_room * sizeof *pool));
    }
    peer->awaiting = NOTHING;
    peer->event = NULL;
    pool[pooled++] = peer;
}

static struct peer *take(void)
{
    if (pooled > 0)
        return pool[--pooled];
    struct peer *peer = must(calloc(1, sizeof *peer));
    struct sockaddr_un address = unix_address(options.socket);
    peer->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (peer->fd < 0 || connect(peer->fd, (struct sockaddr *)&address, sizeof address) != 0)
        die("%s: %s", options.socket, strerror(errno));
    fcntl(peer->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event wanted = {.events = EPOLLIN | EPOLLET, .data.ptr = peer};
    epoll_ctl(epoll, EPOLL_CTL_ADD, peer->fd, &wanted);
    count.connects++;
    return peer;
}

/* Kong abandons a connection after an exit; a vanishing client's goes in the middle. */
static void abandon(struct peer *peer)
{
    close(peer->fd);
    free(peer->buffer);
    peer->buffer = NULL;
    peer->size = peer->room = 0;
    peer->fd = -1;
}

static void send_all(struct peer *peer, const void *data, size_t size)
{
    const char *at = data;
    while (size > 0) {
        ssize_t sent = send(peer->fd, at, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd writable = {.fd = peer->fd, .events = POLLOUT};
            if (poll(&writable, 1, STUCK_MS) == 0)
                die("the server does not read");
            continue;
        }
        if (sent < 0)
            die("send: %s", strerror(errno));
        at += sent;
        size -= (size_t)sent;
    }
}

/* --- events, whatever the protocol -------------------------------------------------------- */

static void pb_begin(struct peer *peer, struct event *event);
static void mp_begin(struct peer *peer, struct event *event);

/* Whether the next event's time has come; without a rate it always has. */
static int due(void)
{
    return options.rate <= 0 || begun < (double)(now_ns() - paced_from) / 1e9 * options.rate;
}

static void begin_events(void)
{
    while (in_flight < limit && due()) {
        begun++;
        struct event *event = free_events;
        if (event != NULL)
            free_events = event->next_free;
        else
            event = must(malloc(sizeof *event));
        memset(event, 0, sizeof *event);
        event->token = &tokens.all[next_token];
        next_token = (next_token + 1) % tokens.count;
        if (options.vanish_every > 0 && ++vanish_turn % options.vanish_every == 0)
            event->vanish_at = 1 + (int)(vanish_turn / options.vanish_every % 3);
        event->started_ns = now_ns();
        in_flight++;
        struct peer *peer = take();
        peer->event = event;
        if (options.msgpack)
            mp_begin(peer, event);
        else
            pb_begin(peer, event);
        if (peer->fd < 0)
            free(peer);
    }
}

static void end_event(struct peer *peer, struct event *event)
{
    note_latency(now_ns() - event->started_ns);
    count.events++;
    count.calls += event->calls;
    ended++;
    in_flight--;
    if (peer->fd >= 0 && !peer->used) {
        peer->used = 1;
        fresh--;
    }
    event->next_free = free_events;
    free_events = event;
}

static void check_set(struct event *event, const char *value, size_t size)
{
    struct token *token = event->token;
    event->sets++;
    if (token->kind == 'e')
        die("a request that must be refused got a header");
    if (token->kind == 'l' && token->out == NULL) {
        if (size == token->in_size && memcmp(value, token->in, size) == 0)
            die("the header was not replaced");
        token->out = must(malloc(size));
        memcpy(token->out, value, size);
        token->out_size = size;
    }
    if (size != token->out_size || memcmp(value, token->out, size) != 0)
        die("wrong header value for %.40s...: %.*s", token->in, (int)(size < 60 ? size : 60), value);
}

static void check_success(const struct event *event)
{
    if (event->token->kind == 'e')
        die("a request that must be refused went on");
    if (event->sets != 1)
        die("%d headers were set instead of one", event->sets);
}

static void check_exit(const struct event *event, uint64_t status)
{
    if (event->token->kind != 'e' || event->token->status != (int)status)
        die("exit %d for %.40s...", (int)status, event->token->in);
    count.exits++;
}

/* Returns 1 when the client of this event leaves at this point. */
static int vanishes(struct peer *peer, struct event *event, int point)
{
    if (event->vanish_at != point)
        return 0;
    if (point == 2) /* half a frame, to be awkward */
        send_all(peer, "\x10\0", 2);
    abandon(peer);
    count.vanished++;
    end_event(peer, event);
    return 1;
}

static int is(const char *data, size_t size, const char *text)
{
    return size == strlen(text) && memcmp(data, text, size) == 0;
}

/* --- ProtoBuf:1 --------------------------------------------------------------------------- */

static void pb_send(struct peer *peer, const struct bytes *payload)
{
    uint32_t length = (uint32_t)payload->size;
    send_all(peer, &length, 4);
    if (length > 0)
        send_all(peer, payload->data, payload->size);
}

static void pb_command(struct peer *peer, unsigned number, const struct bytes *body)
{
    static struct bytes out;
    out.size = 0;
    add_varint(&out, 1 << 3);
    add_varint(&out, ++sequence);
    add_length_field(&out, number, body->data, body->size);
    pb_send(peer, &out);
}

static void pb_begin(struct peer *peer, struct event *event)
{
    static struct bytes body;
    body.size = 0;
    add_varint(&body, 1 << 3);
    add_varint(&body, instance_id);
    add_length_field(&body, 2, "access", 6);
    peer->awaiting = METHOD;
    pb_command(peer, 36, &body);
    event->sequence = sequence;
    vanishes(peer, event, 1);
}

static void pb_check_set(struct event *event, const char *argument, size_t size)
{
    struct reader in = reader_of(argument, size);
    struct field field, value = {0};
    const char *name = NULL;
    size_t name_size = 0;
    while (read_field(&in, &field)) {
        if (field.number == 1)
            name = field.data, name_size = field.value;
        else
            value = field;
    }
    if (name == NULL || strncasecmp(name, "authorization", name_size) != 0)
        return;
    in = reader_of(value.data, value.value);
    while (read_field(&in, &field))
        if (field.number == 3) {
            check_set(event, field.data, field.value);
            return;
        }
    die("set_header without text");
}

static uint64_t pb_varint(const char *payload, size_t size, unsigned number)
{
    struct reader in = reader_of(payload, size);
    struct field field;
    while (read_field(&in, &field))
        if (field.number == number)
            return field.value;
    return 0;
}

/* Carry out one call as Kong's PDK would. */
static void pb_call(struct peer *peer, const char *argument, size_t size)
{
    struct event *event = peer->event;
    const char *method = peer->method;
    static struct bytes reply;
    reply.size = 0;
    event->calls++;
    peer->awaiting = METHOD;
    if (strcmp(method, "kong.response.exit") == 0) {
        check_exit(event, pb_varint(argument, size, 1));
        abandon(peer);
        end_event(peer, event);
        return;
    }
    if (strcmp(method, "kong.request.get_header") == 0) {
        if (size < 15 || strncasecmp(argument + 2, "authorization", 13) != 0)
            die("get_header of another header");
        if (vanishes(peer, event, 2))
            return;
        add_length_field(&reply, 1, event->token->in, event->token->in_size);
    } else if (strcmp(method, "kong.service.request.set_header") == 0) {
        pb_check_set(event, argument, size);
        if (vanishes(peer, event, 3))
            return;
    } else if (strncmp(method, "kong.", 5) != 0) {
        die("unknown method %s", method);
    }
    pb_send(peer, &reply);
}

static void pb_frame(struct peer *peer, const char *payload, size_t size)
{
    struct event *event = peer->event;
    switch (peer->awaiting) {
    case METHOD:
        if (size == 0) {
            peer->awaiting = RETURN;
        } else {
            if (size >= sizeof peer->method)
                die("method name too long");
            memcpy(peer->method, payload, size);
            peer->method[size] = '\0';
            peer->awaiting = ARGUMENT;
        }
        break;
    case ARGUMENT:
        pb_call(peer, payload, size);
        break;
    case RETURN:
        if (pb_varint(payload, size, 1) != event->sequence)
            die("wrong sequence number");
        check_success(event);
        end_event(peer, event);
        release(peer);
        break;
    default:
        die("bytes without a question");
    }
}

static size_t pb_take(struct peer *peer, const char *data, size_t size)
{
    size_t at = 0;
    while (peer->fd >= 0 && size - at >= 4) {
        uint32_t length;
        memcpy(&length, data + at, 4);
        if (length > 1 << 20)
            die("frame too long");
        if (size - at - 4 < length)
            break;
        at += 4 + length;
        pb_frame(peer, data + at - length, length);
    }
    return at;
}

/* --- MsgPack:1 ---------------------------------------------------------------------------- */

struct mp {
    enum { MP_NIL, MP_BOOL, MP_INT, MP_TEXT, MP_ARRAY, MP_MAP, MP_OTHER } kind;
    uint64_t value; /* of an int, else a length or a count */
    const char *data;
};

static uint64_t mp_big_endian(struct reader *in, int size, int *whole)
{
    uint64_t value = 0;
    if (in->end - in->at < size) {
        *whole = 0;
        return 0;
    }
    for (int i = 0; i < size; i++)
        value = value << 8 | *in->at++;
    return value;
}

/* Reads the head of one object, and of a text its bytes too; 0 when more bytes are needed. */
static int mp_read(struct reader *in, struct mp *out)
{
    int whole = 1;
    if (in->at == in->end)
        return 0;
    unsigned char tag = *in->at++;
    out->data = NULL;
    if (tag < 0x80 || tag >= 0xe0)
        *out = (struct mp){MP_INT, tag, NULL};
    else if (tag < 0x90)
        *out = (struct mp){MP_MAP, tag & 15, NULL};
    else if (tag < 0xa0)
        *out = (struct mp){MP_ARRAY, tag & 15, NULL};
    else if (tag < 0xc0)
        *out = (struct mp){MP_TEXT, tag & 31, NULL};
    else if (tag == 0xc0)
        *out = (struct mp){MP_NIL, 0, NULL};
    else if (tag == 0xc2 || tag == 0xc3)
        *out = (struct mp){MP_BOOL, tag & 1, NULL};
    else if (tag >= 0xc4 && tag <= 0xc6)
        *out = (struct mp){MP_TEXT, mp_big_endian(in, 1 << (tag - 0xc4), &whole), NULL};
    else if (tag >= 0xcc && tag <= 0xcf)
        *out = (struct mp){MP_INT, mp_big_endian(in, 1 << (tag - 0xcc), &whole), NULL};
    else if (tag >= 0xd0 && tag <= 0xd3)
        *out = (struct mp){MP_INT, mp_big_endian(in, 1 << (tag - 0xd0), &whole), NULL};
    else if (tag >= 0xd9 && tag <= 0xdb)
        *out = (struct mp){MP_TEXT, mp_big_endian(in, 1 << (tag - 0xd9), &whole), NULL};
    else if (tag == 0xdc || tag == 0xdd)
        *out = (struct mp){MP_ARRAY, mp_big_endian(in, tag == 0xdc ? 2 : 4, &whole), NULL};
    else if (tag == 0xde || tag == 0xdf)
        *out = (struct mp){MP_MAP, mp_big_endian(in, tag == 0xde ? 2 : 4, &whole), NULL};
    else if (tag == 0xca || tag == 0xcb) /* a time in StartInstance's answer */
        *out = (struct mp){MP_OTHER, mp_big_endian(in, tag == 0xca ? 4 : 8, &whole), NULL};
    else
        die("unexpected MsgPack type 0x%02x", tag);
    if (out->kind == MP_TEXT) {
        if (!whole || out->value > (uint64_t)(in->end - in->at))
            return 0;
        out->data = (const char *)in->at;
        in->at += out->value;
    }
    return whole;
}

static int mp_skip(struct reader *in)
{
    struct mp object;
    if (!mp_read(in, &object))
        return 0;
    uint64_t members = object.kind == MP_ARRAY ? object.value : object.kind == MP_MAP ? object.value * 2 : 0;
    while (members-- > 0)
        if (!mp_skip(in))
            return 0;
    return 1;
}

static struct mp mp_next(struct reader *in)
{
    struct mp object = {0};
    if (!mp_read(in, &object))
        die("malformed MsgPack");
    return object;
}

/* The member of a map, whose head has been read; leaves *in* as it was. */
static struct reader mp_member(struct reader in, uint64_t members, const char *wanted)
{
    while (members-- > 0) {
        struct mp name = mp_next(&in);
        if (name.kind == MP_TEXT && is(name.data, name.value, wanted))
            return in;
        if (!mp_skip(&in))
            die("malformed MsgPack");
    }
    die("no member %s", wanted);
    return in;
}

static void mp_text(struct bytes *out, const char *data, size_t size)
{
    if (size < 32) {
        unsigned char tag = (unsigned char)(0xa0 | size);
        add(out, &tag, 1);
    } else if (size < 256) {
        unsigned char tag[] = {0xd9, (unsigned char)size};
        add(out, tag, 2);
    } else {
        unsigned char tag[] = {0xda, (unsigned char)(size >> 8), (unsigned char)size};
        add(out, tag, 3);
    }
    add(out, data, size);
}

static void mp_int(struct bytes *out, uint64_t value)
{
    if (value < 0x80) {
        unsigned char tag = (unsigned char)value;
        add(out, &tag, 1);
    } else {
        unsigned char tag[] = {0xce, (unsigned char)(value >> 24), (unsigned char)(value >> 16),
                               (unsigned char)(value >> 8), (unsigned char)value};
        add(out, tag, 5);
    }
}

/* [0, id, method, [ — the arguments and their end are the caller's. */
static void mp_head(struct bytes *out, const char *method)
{
    out->size = 0;
    add(out, "\x94\x00", 2);
    mp_int(out, ++sequence);
    mp_text(out, method, strlen(method));
    add(out, "\x91", 1);
}

static void mp_begin(struct peer *peer, struct event *event)
{
    static struct bytes out;
    mp_head(&out, "plugin.HandleEvent");
    add(&out, "\x82", 1);
    mp_text(&out, "InstanceId", 10);
    mp_int(&out, instance_id);
    mp_text(&out, "EventName", 9);
    mp_text(&out, "access", 6);
    event->sequence = sequence;
    peer->awaiting = RESPONSE;
    send_all(peer, out.data, out.size);
    vanishes(peer, event, 1);
}

static void mp_step(struct event *event, const char *data, size_t size)
{
    static struct bytes out;
    struct peer *peer = take();
    mp_head(&out, "plugin.Step");
    add(&out, data ? "\x82" : "\x81", 1);
    mp_text(&out, "EventId", 7);
    mp_int(&out, event->event_id);
    if (data) {
        mp_text(&out, "Data", 4);
        mp_text(&out, data, size);
    }
    event->sequence = sequence;
    peer->event = event;
    peer->awaiting = RESPONSE;
    send_all(peer, out.data, out.size);
}

static void mp_call(struct event *event, struct reader data, uint64_t members)
{
    struct reader in = mp_member(data, members, "Method");
    struct mp method = mp_next(&in);
    in = mp_member(data, members, "Args");
    struct mp list = mp_next(&in), name = {0}, value = {0};
    if (list.kind == MP_ARRAY && list.value > 0)
        name = mp_next(&in);
    if (list.kind == MP_ARRAY && list.value > 1)
        value = mp_next(&in);
    event->calls++;
    if (is(method.data, method.value, "kong.request.get_header")) {
        mp_step(event, event->token->in, event->token->in_size);
    } else if (is(method.data, method.value, "kong.service.request.set_header")) {
        check_set(event, value.data, value.value);
        mp_step(event, NULL, 0);
    } else if (is(method.data, method.value, "kong.response.exit")) {
        /* Kong never comes back with a step; the event is over. */
        check_exit(event, name.value);
        struct peer none = {.fd = -1};
        end_event(&none, event);
    } else {
        die("unexpected call %.*s", (int)method.value, method.data);
    }
}

static void mp_response(struct peer *peer, struct reader in)
{
    struct event *event = peer->event;
    struct mp head = mp_next(&in);
    if (head.kind != MP_ARRAY || head.value != 4 || mp_next(&in).value != 1)
        die("not a response");
    if (mp_next(&in).value != event->sequence)
        die("wrong message id");
    struct mp error = mp_next(&in), result = mp_next(&in);
    if (error.kind != MP_NIL)
        die("the server answers: %.*s", (int)error.value, error.data ? error.data : "?");
    struct reader member = mp_member(in, result.value, "EventId");
    event->event_id = mp_next(&member).value;
    member = mp_member(in, result.value, "Data");
    struct mp data = mp_next(&member);
    if (data.kind == MP_TEXT && is(data.data, data.value, "ret")) {
        check_success(event);
        end_event(peer, event);
        release(peer);
        return;
    }
    if (data.kind != MP_MAP)
        die("neither a call nor the end");
    /* Kong gives the socket back before it acts, so the next step goes out on this one. */
    if (!peer->used) {
        peer->used = 1;
        fresh--;
    }
    release(peer);
    mp_call(event, member, data.value);
}

static size_t mp_take(struct peer *peer, const char *data, size_t size)
{
    struct reader in = reader_of(data, size);
    struct reader whole = in;
    if (!mp_skip(&in))
        return 0;
    whole.end = in.at;
    if (in.at != reader_of(data, size).end)
        die("bytes after a response");
    mp_response(peer, whole);
    return size;
}

/* --- starting an instance ------------------------------------------------------------------ */

static struct bytes receive_blocking(struct peer *peer)
{
    struct bytes in = {0};
    char part[4096];
    for (;;) {
        struct pollfd readable = {.fd = peer->fd, .events = POLLIN};
        if (poll(&readable, 1, STUCK_MS) == 0)
            die("no answer to StartInstance");
        ssize_t got = recv(peer->fd, part, sizeof part, 0);
        if (got <= 0)
            die("no instance: the server closed");
        add(&in, part, (size_t)got);
        struct reader whole = reader_of(in.data, in.size);
        uint32_t length;
        if (options.msgpack ? mp_skip(&whole)
                            : in.size >= 4 && (memcpy(&length, in.data, 4), in.size >= 4 + length))
            return in;
    }
}

static void start_instance(void)
{
    struct peer *peer = take();
    struct bytes body = {0};
    if (options.msgpack) {
        mp_head(&body, "plugin.StartInstance");
        add(&body, "\x82", 1);
        mp_text(&body, "Name", 4);
        mp_text(&body, options.plugin, strlen(options.plugin));
        mp_text(&body, "Config", 6);
        mp_text(&body, options.config, strlen(options.config));
        send_all(peer, body.data, body.size);
        struct bytes answer = receive_blocking(peer);
        struct reader in = reader_of(answer.data, answer.size);
        mp_next(&in), mp_next(&in), mp_next(&in);
        if (mp_next(&in).kind != MP_NIL)
            die("no instance");
        struct mp result = mp_next(&in);
        in = mp_member(in, result.value, "Id");
        instance_id = mp_next(&in).value;
    } else {
        add_length_field(&body, 1, options.plugin, strlen(options.plugin));
        add_length_field(&body, 2, options.config, strlen(options.config));
        pb_command(peer, 33, &body);
        struct bytes answer = receive_blocking(peer);
        struct reader in = reader_of(answer.data + 4, answer.size - 4);
        struct field field, status = {0};
        while (read_field(&in, &field))
            if (field.number == 33)
                status = field;
        instance_id = pb_varint(status.data, status.value, 2);
        if (instance_id == 0)
            die("no instance");
    }
    release(peer);
}

/* --- the loop ------------------------------------------------------------------------------ */

static void receive(struct peer *peer)
{
    if (peer->room - peer->size < RECV_BYTES) {
        peer->room = peer->size + RECV_BYTES;
        peer->buffer = must(realloc(peer->buffer, peer->room));
    }
    ssize_t got = recv(peer->fd, peer->buffer + peer->size, peer->room - peer->size, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    if (got <= 0)
        die("the server closed a connection %s", peer->event ? "in the middle of an event" : "of the pool");
    if (peer->event == NULL)
        die("bytes on an idle connection");
    peer->size += (size_t)got;
    size_t taken = options.msgpack ? mp_take(peer, peer->buffer, peer->size)
                                   : pb_take(peer, peer->buffer, peer->size);
    if (peer->fd >= 0) {
        peer->size -= taken;
        memmove(peer->buffer, peer->buffer + taken, peer->size);
    }
}

static void turn(void)
{
    struct epoll_event ready[256];
    /* With a rate there are times when nothing is under way. */
    int events = epoll_wait(epoll, ready, 256, options.rate > 0 ? 1 : STUCK_MS);
    if (events > 0 || in_flight == 0)
        last_arrival = now_ns();
    else if (events == 0 && now_ns() - last_arrival >= STUCK_MS * 1000000ull)
        die("stuck: %d events in flight and nothing comes", in_flight);
    for (int i = 0; i < events; i++) {
        struct peer *peer = ready[i].data.ptr;
        if (peer->fd < 0)
            continue;
        receive(peer);
        if (peer->fd < 0)
            free(peer);
    }
    begin_events();
}

static uint64_t own_cpu_ns(void)
{
    return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

static void run(void)
{
    start_instance();
    paced_from = last_arrival = now_ns();
    /* As many at once as there are sockets, so that the idle ones have been used too. */
    limit = fresh = options.sockets + options.idle;
    begin_events();
    while (options.idle > 0 && fresh > 0)
        turn();
    limit = options.sockets;
    uint64_t warm_until = now_ns() + (uint64_t)(options.warmup * 1e9);
    while (now_ns() < warm_until || ended < options.warmup_events)
        turn();

    memset(&count, 0, sizeof count);
    memset(histogram, 0, sizeof histogram);
    uint64_t cpu = server_cpu_ns(), own = own_cpu_ns(), started = now_ns(), now = started;
    uint64_t until = started + (uint64_t)(options.seconds * 1e9);
    while (options.events > 0 ? count.events < options.events : now < until) {
        turn();
        now = now_ns();
    }
    cpu = server_cpu_ns() - cpu;
    own = own_cpu_ns() - own;
    if (count.events == 0)
        die("no event ended");
    double seconds = (double)(now - started) / 1e9, events = (double)count.events;
    printf("{\"events\": %ld, \"seconds\": %.4f, \"events_per_s\": %.1f, \"cpu_us_per_event\": %.3f, "
           "\"own_cpu_us_per_event\": %.3f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"calls_per_event\": %.2f, "
           "\"exits\": %ld, \"vanished\": %ld, \"connects\": %ld}\n",
           count.events, seconds, events / seconds, (double)cpu / events / 1000, (double)own / events / 1000,
           percentile_us(0.50), percentile_us(0.99), (double)count.calls / events, count.exits, count.vanished,
           count.connects);
}

static void read_pids(const char *list)
{
    char *copy = must(strdup(list));
    for (char *pid = strtok(copy, ","); pid != NULL; pid = strtok(NULL, ",")) {
        if (clock_count == MAX_PIDS || clock_getcpuclockid(atoi(pid), &clocks[clock_count++]) != 0)
            die("no CPU clock of process %s", pid);
    }
    free(copy);
}

static void usage(void)
{
    die("usage: loadgen --socket PATH --tokens FILE\n"
        "  --protocol pb|mp     ProtoBuf:1 (default) or MsgPack:1\n"
        "  --plugin NAME        the plugin, and with\n"
        "  --config JSON        the configuration that StartInstance carries\n"
        "  --sockets N          events in flight (16)\n"
        "  --idle N             more open sockets in the pool, used once\n"
        "  --warmup SECONDS     before the measured window, and at least\n"
        "  --warmup-events N    so many events\n"
        "  --rate N             begin no more than N events a second\n"
        "  --seconds SECONDS    the measured window (1), or\n"
        "  --events N           until so many events have ended\n"
        "  --vanish-every N     each Nth client leaves in the middle of its event\n"
        "  --cpu-of PID,PID     processes whose CPU time is charged to the events");
}

int main(int argument_count, char **arguments)
{
    for (int i = 1; i < argument_count; i += 2) {
        const char *name = arguments[i], *value = arguments[i + 1];
        if (value == NULL)
            usage();
        if (strcmp(name, "--socket") == 0)
            options.socket = value;
        else if (strcmp(name, "--tokens") == 0)
            options.tokens = value;
        else if (strcmp(name, "--protocol") == 0)
            options.msgpack = strcmp(value, "mp") == 0;
        else if (strcmp(name, "--plugin") == 0)
            options.plugin = value;
        else if (strcmp(name, "--config") == 0)
            options.config = value;
        else if (strcmp(name, "--sockets") == 0)
            options.sockets = atoi(value);
        else if (strcmp(name, "--idle") == 0)
            options.idle = atoi(value);
        else if (strcmp(name, "--warmup") == 0)
            options.warmup = atof(value);
        else if (strcmp(name, "--warmup-events") == 0)
            options.warmup_events = atol(value);
        else if (strcmp(name, "--rate") == 0)
            options.rate = atof(value);
        else if (strcmp(name, "--seconds") == 0)
            options.seconds = atof(value);
        else if (strcmp(name, "--events") == 0)
            options.events = atol(value);
        else if (strcmp(name, "--vanish-every") == 0)
            options.vanish_every = atol(value);
        else if (strcmp(name, "--cpu-of") == 0)
            read_pids(value);
        else
            usage();
    }
    if (options.socket == NULL || options.tokens == NULL || options.sockets < 1)
        usage();
    struct rlimit files = {65536, 65536};
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    tokens = read_tokens(options.tokens);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    run();
    return 0;
}
