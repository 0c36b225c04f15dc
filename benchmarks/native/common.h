/*
 * What the load generator and the floor server share: tokens from a file, growing byte strings,
 * and as much of ProtoBuf:1 as both need. Little-endian machines only, as Kong's frames are.
 */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static void *must(void *memory)
{
    if (memory == NULL)
        die("out of memory");
    return memory;
}

/* --- byte strings ------------------------------------------------------------------------- */

struct bytes {
    char *data;
    size_t size, room;
};

static void add(struct bytes *out, const void *data, size_t size)
{
    if (out->size + size > out->room) {
        out->room = (out->size + size) * 2 + 256;
        out->data = must(realloc(out->data, out->room));
    }
    memcpy(out->data + out->size, data, size);
    out->size += size;
}

static void add_varint(struct bytes *out, uint64_t value)
{
    while (value > 0x7f) {
        char byte = (char)(value | 0x80);
        add(out, &byte, 1);
        value >>= 7;
    }
    char last = (char)value;
    add(out, &last, 1);
}

static void add_length_field(struct bytes *out, unsigned number, const void *data, size_t size)
{
    add_varint(out, number << 3 | 2);
    add_varint(out, size);
    add(out, data, size);
}

static void add_frame(struct bytes *out, const void *data, size_t size)
{
    uint32_t length = (uint32_t)size;
    add(out, &length, 4);
    add(out, data, size);
}

/* --- reading messages --------------------------------------------------------------------- */

struct reader {
    const unsigned char *at, *end;
};

struct field {
    unsigned number;
    uint64_t value; /* of a varint, else the length */
    const char *data; /* of a length-delimited field, else NULL */
};

static int read_varint(struct reader *in, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; in->at < in->end && shift < 64; shift += 7) {
        unsigned char byte = *in->at++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return 1;
    }
    return 0;
}

/* 1 for a field, 0 at the end; a message that is none ends the program. */
static int read_field(struct reader *in, struct field *field)
{
    uint64_t key;
    if (in->at == in->end)
        return 0;
    if (!read_varint(in, &key) || !read_varint(in, &field->value))
        die("malformed message");
    field->number = (unsigned)(key >> 3);
    field->data = NULL;
    if ((key & 7) == 2) {
        if (field->value > (uint64_t)(in->end - in->at))
            die("malformed message");
        field->data = (const char *)in->at;
        in->at += field->value;
    } else if ((key & 7) != 0) {
        die("unexpected wire type");
    }
    return 1;
}

static struct reader reader_of(const void *data, size_t size)
{
    struct reader in = {data, (const unsigned char *)data + size};
    return in;
}

/* --- tokens ------------------------------------------------------------------------------- */

/*
 * One line of the token file: kind, TAB, the Authorization header that comes in, TAB, what is
 * expected: for "set" the header that must be set, for "learn" nothing (the first answer is kept and
 * every later one must equal it), for "exit" the status of kong.response.exit.
 */
struct token {
    char kind;
    int status;
    size_t in_size, out_size;
    char *in, *out;
};

struct tokens {
    struct token *all;
    size_t count;
};

static struct tokens read_tokens(const char *path)
{
    struct tokens tokens = {NULL, 0};
    FILE *file = fopen(path, "r");
    if (file == NULL)
        die("%s: %s", path, strerror(errno));
    char *line = NULL;
    size_t room = 0;
    for (ssize_t size; (size = getline(&line, &room, file)) > 0;) {
        line[strcspn(line, "\n")] = '\0';
        char *in = strchr(line, '\t');
        char *out = in ? strchr(in + 1, '\t') : NULL;
        if (out == NULL)
            die("%s: a line needs three columns", path);
        *in++ = *out++ = '\0';
        tokens.all = must(realloc(tokens.all, (tokens.count + 1) * sizeof *tokens.all));
        struct token *token = &tokens.all[tokens.count++];
        token->kind = line[0];
        token->in = must(strdup(in));
        token->in_size = strlen(in);
        token->out = line[0] == 's' ? must(strdup(out)) : NULL;
        token->out_size = line[0] == 's' ? strlen(out) : 0;
        token->status = atoi(out);
    }
    free(line);
    fclose(file);
    if (tokens.count == 0)
        die("%s: no tokens", path);
    return tokens;
}

/* --- sockets ------------------------------------------------------------------------------ */

static struct sockaddr_un unix_address(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        die("socket path too long: %s", path);
    strcpy(address.sun_path, path);
    return address;
}

#endif
