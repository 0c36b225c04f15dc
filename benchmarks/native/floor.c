/*
 * The floor: a bare server in C that answers ProtoBuf:1 with the same frames as the Python plugin
 * of the benchmark and does nothing else. It trusts its peer, hashes with a multiply instead of a
 * SHA-256, knows one configuration and dies of anything unexpected.
 *
 *     floor SOCKET TOKENS
 */
#define _GNU_SOURCE
#include "common.h"

#include <sys/epoll.h>

#define RECV_BYTES 65536

struct entry {
    const struct token *token;
    struct bytes frames; /* the set_header call and the empty frame that ends the event */
};

struct peer {
    int fd, skip, waiting;
    char sequence[16];
    size_t sequence_size, held;
    char buffer[RECV_BYTES];
};

static struct entry *table;
static size_t table_mask;
static struct bytes get_header;

static uint64_t hash(const char *data, size_t size)
{
    uint64_t value = size;
    for (; size >= 8; data += 8, size -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        value = (value ^ word) * 0x9e3779b97f4a7c15u;
        value ^= value >> 32;
    }
    for (; size > 0; data++, size--)
        value = (value ^ (unsigned char)*data) * 0x100000001b3u;
    return value ^ value >> 29;
}

static void call(struct bytes *out, const char *method, const struct bytes *argument)
{
    add_frame(out, method, strlen(method));
    add_frame(out, argument->data, argument->size);
}

static void build_table(const struct tokens *tokens)
{
    struct bytes name = {0};
    add_length_field(&name, 1, "authorization", 13);
    call(&get_header, "kong.request.get_header", &name);
    for (table_mask = 1; table_mask < tokens->count * 2; table_mask *= 2)
        ;
    table = must(calloc(table_mask, sizeof *table));
    table_mask--;
    for (size_t i = 0; i < tokens->count; i++) {
        const struct token *token = &tokens->all[i];
        size_t slot = hash(token->in, token->in_size) & table_mask;
        while (table[slot].token != NULL)
            slot = (slot + 1) & table_mask;
        struct bytes value = {0}, argument = {0};
        add_length_field(&value, 3, token->out, token->out_size);
        add_length_field(&argument, 1, "authorization", 13);
        add_length_field(&argument, 2, value.data, value.size);
        table[slot].token = token;
        call(&table[slot].frames, "kong.service.request.set_header", &argument);
        add_frame(&table[slot].frames, "", 0);
        free(value.data);
        free(argument.data);
    }
    free(name.data);
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size > 0) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EPIPE || errno == ECONNRESET)
                return;
            die("send: %s", strerror(errno));
        }
        data += sent;
        size -= (size_t)sent;
    }
}

static void answer_fact(struct peer *peer, const char *payload, size_t size)
{
    struct reader in = reader_of(payload, size);
    struct field field = {0};
    while (read_field(&in, &field) && field.number != 1)
        ;
    if (field.data == NULL)
        die("no token in the answer");
    size_t slot = hash(field.data, field.value) & table_mask;
    const struct token *token;
    while ((token = table[slot].token) != NULL &&
           (token->in_size != field.value || memcmp(token->in, field.data, field.value) != 0))
        slot = (slot + 1) & table_mask;
    if (token == NULL)
        die("unknown token");
    char out[RECV_BYTES];
    const struct bytes *frames = &table[slot].frames;
    uint32_t length = (uint32_t)peer->sequence_size;
    memcpy(out, frames->data, frames->size);
    memcpy(out + frames->size, &length, 4);
    memcpy(out + frames->size + 4, peer->sequence, length);
    send_all(peer->fd, out, frames->size + 4 + length);
    peer->waiting = 0;
    peer->skip = 1;
}

static void answer_command(struct peer *peer, const char *payload, size_t size)
{
    struct reader in = reader_of(payload, size);
    struct field field;
    uint64_t sequence = 0;
    unsigned command = 0;
    while (read_field(&in, &field)) {
        if (field.number == 1)
            sequence = field.value;
        else
            command = field.number;
    }
    struct bytes back = {peer->sequence, 0, sizeof peer->sequence};
    add_varint(&back, 1 << 3);
    add_varint(&back, sequence);
    peer->sequence_size = back.size;
    if (command == 36) { /* cmd_handle_event */
        peer->waiting = 1;
        send_all(peer->fd, get_header.data, get_header.size);
        return;
    }
    struct bytes reply = {0}, status = {0}, out = {0};
    add(&reply, back.data, back.size);
    if (command == 33) { /* cmd_start_instance */
        add_varint(&status, 2 << 3);
        add_varint(&status, 1);
        add_length_field(&reply, 33, status.data, status.size);
    }
    add_frame(&out, reply.data, reply.size);
    send_all(peer->fd, out.data, out.size);
    free(reply.data);
    free(status.data);
    free(out.data);
}

/* Returns 0 when the peer has left. */
static int serve(struct peer *peer)
{
    ssize_t got = recv(peer->fd, peer->buffer + peer->held, RECV_BYTES - peer->held, 0);
    if (got <= 0)
        return 0;
    size_t size = peer->held + (size_t)got, at = 0;
    while (size - at >= 4) {
        uint32_t length;
        memcpy(&length, peer->buffer + at, 4);
        if (length > RECV_BYTES - 4)
            die("frame too long");
        if (size - at - 4 < length)
            break;
        const char *payload = peer->buffer + at + 4;
        at += 4 + length;
        if (peer->skip > 0)
            peer->skip--;
        else if (peer->waiting)
            answer_fact(peer, payload, length);
        else
            answer_command(peer, payload, length);
    }
    peer->held = size - at;
    memmove(peer->buffer, peer->buffer + at, peer->held);
    return 1;
}

int main(int count, char **arguments)
{
    if (count != 3)
        die("usage: floor SOCKET TOKENS");
    struct tokens tokens = read_tokens(arguments[2]);
    build_table(&tokens);
    struct sockaddr_un address = unix_address(arguments[1]);
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    unlink(arguments[1]);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 4096) != 0)
        die("%s: %s", arguments[1], strerror(errno));
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL}, events[64];
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(epoll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            struct peer *peer = events[i].data.ptr;
            if (peer == NULL) {
                peer = must(calloc(1, sizeof *peer));
                peer->fd = accept(listener, NULL, NULL);
                event.data.ptr = peer;
                epoll_ctl(epoll, EPOLL_CTL_ADD, peer->fd, &event);
            } else if (!serve(peer)) {
                close(peer->fd);
                free(peer);
            }
        }
    }
}
