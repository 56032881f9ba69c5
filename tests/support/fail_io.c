/* LD_PRELOAD: the Nth call of one kind on a file below a path fails once with an errno, or the
   process gets a signal there (a negative errno). The kind "change" is each call that changes the disk.
   fail_io_set chooses kind, N, errno and path; fail_io_count says how many calls there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char kind[16], below[4096];
static long at, count;
static int number;

void fail_io_set(const char *k, long n, int e, const char *path) {
    strncpy(kind, k, sizeof kind - 1);
    strncpy(below, path, sizeof below - 1);
    at = n;
    number = e;
    count = 0;
}
long fail_io_count(void) { return count; }

static int named(const char *path) { return below[0] && path && strstr(path, below) == path; }
static int open_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return named(path);
}
static int changes(const char *k) {
    return strcmp(k, "read") && strcmp(k, "pread") && strcmp(k, "short read") && strcmp(k, "close");
}
static int struck(const char *k) {
    if (strcmp(kind, k) && (strcmp(kind, "change") || !changes(k))) return 0;
    return ++count == at;
}
static int fails(const char *k) {
    if (!struck(k)) return 0;
    if (number < 0) return kill(getpid(), -number);
    errno = number;
    return 1;
}
#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        int alters = flags & (O_CREAT | O_TRUNC) || strcmp(kind, "change"); \
        return named(path) && alters && fails("open") ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
/* A short read or write is half of what was asked for: no error, and the rest must follow. */
ssize_t read(int fd, void *data, size_t size) {
    REAL(ssize_t, "read", int, void *, size_t);
    if (!open_below(fd)) return real(fd, data, size);
    if (fails("read")) return -1;
    return real(fd, data, size > 1 && struck("short read") ? size / 2 : size);
}
static struct iovec less(const struct iovec *v, int n) {
    size_t size = v->iov_len;
    return (struct iovec){v->iov_base, n == 1 && size > 1 && struck("short read") ? size / 2 : size};
}
#define PREADV(name) \
    ssize_t name(int fd, const struct iovec *v, int n, off_t offset) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, off_t); \
        if (!open_below(fd)) return real(fd, v, n, offset); \
        if (fails("pread")) return -1; \
        struct iovec some = less(v, n); \
        return real(fd, n == 1 ? &some : v, n, offset); \
    }
#define PREADV2(name) \
    ssize_t name(int fd, const struct iovec *v, int n, off_t offset, int flags) { \
        REAL(ssize_t, #name, int, const struct iovec *, int, off_t, int); \
        if (!open_below(fd)) return real(fd, v, n, offset, flags); \
        if (fails("pread")) return -1; \
        struct iovec some = less(v, n); \
        return real(fd, n == 1 ? &some : v, n, offset, flags); \
    }
PREADV(preadv)
PREADV(preadv64)
PREADV2(preadv2)
PREADV2(preadv64v2)
ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!open_below(fd)) return real(fd, data, size);
    if (fails("write")) return -1;
    if (size < 2 || !struck("short")) return real(fd, data, size);
    ssize_t written = real(fd, data, size / 2);
    if (number < 0) kill(getpid(), -number);
    return written;
}
/* The descriptor is gone even if close fails, as on Linux. */
int close(int fd) {
    REAL(int, "close", int);
    int failed = open_below(fd) && fails("close"), why = errno, closed = real(fd);
    if (!failed) return closed;
    errno = why;
    return -1;
}
int fsync(int fd) {
    REAL(int, "fsync", int);
    return open_below(fd) && fails("fsync") ? -1 : real(fd);
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return named(from) && fails("rename") ? -1 : real(from, to);
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    return named(from) && fails("rename") ? -1 : real(a, from, b, to, flags);
}
int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    return named(path) && fails("unlink") ? -1 : real(path);
}
int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    return named(path) && fails("rmdir") ? -1 : real(path);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    return named(path) && fails("mkdir") ? -1 : real(path, mode);
}
