/*
 * The service behind Kong: answers every request with the same 200 and keeps the connection.
 * Below /checked it answers 400 unless Authorization is one of the expected values.
 *
 *     upstream PORT TOKENS
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <search.h>
#include <sys/epoll.h>

#define HEAD_BYTES 16384

struct peer {
    int fd;
    size_t size;
    char head[HEAD_BYTES + 1];
};

static const char GOOD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\nok\n";
static const char BAD[] = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\nbad\n";

static int is_expected(char *head)
{
    char *value = strcasestr(head, "\r\nauthorization: ");
    if (value == NULL)
        return 0;
    value += strlen("\r\nauthorization: ");
    char *end = strstr(value, "\r\n");
    *end = '\0';
    ENTRY wanted = {.key = value};
    int found = hsearch(wanted, FIND) != NULL;
    *end = '\r';
    return found;
}

/* Returns 0 when the peer has left. */
static int serve(struct peer *peer)
{
    ssize_t got = recv(peer->fd, peer->head + peer->size, HEAD_BYTES - peer->size, 0);
    if (got <= 0)
        return 0;
    peer->size += (size_t)got;
    peer->head[peer->size] = '\0';
    char *end;
    while ((end = strstr(peer->head, "\r\n\r\n")) != NULL) {
        end[2] = '\0';
        int good = strncmp(peer->head, "GET /checked", 12) != 0 || is_expected(peer->head);
        if (send(peer->fd, good ? GOOD : BAD, (good ? sizeof GOOD : sizeof BAD) - 1, MSG_NOSIGNAL) < 0)
            return 0;
        size_t taken = (size_t)(end + 4 - peer->head);
        peer->size -= taken;
        memmove(peer->head, end + 4, peer->size + 1);
    }
    return peer->size < HEAD_BYTES;
}

int main(int count, char **arguments)
{
    if (count != 3)
        die("usage: upstream PORT TOKENS");
    struct tokens tokens = read_tokens(arguments[2]);
    hcreate(tokens.count * 2);
    for (size_t i = 0; i < tokens.count; i++) {
        ENTRY entry = {.key = tokens.all[i].out};
        hsearch(entry, ENTER);
    }
    int on = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET,
                                  .sin_port = htons((uint16_t)atoi(arguments[1])),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 1024) != 0)
        die("port %s: %s", arguments[1], strerror(errno));
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
                setsockopt(peer->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                event.data.ptr = peer;
                epoll_ctl(epoll, EPOLL_CTL_ADD, peer->fd, &event);
            } else if (!serve(peer)) {
                close(peer->fd);
                free(peer);
            }
        }
    }
}
