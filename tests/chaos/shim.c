/* Counts the calls that change files below one folder, and lets one of them be the process's last, or fail.

Preloaded into a process (LD_PRELOAD) it lies before libc for Python and for native code alike; rustix and others that
make system calls of their own pass it by. It does nothing until `chaos_arm` says so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { OFF, COUNT, BEFORE, AFTER, HALF, STOP, FAIL_FROM, FAIL_ONCE, SHORT };

static char folder[3072];
static volatile int mode = OFF, failure, every;
static volatile long at, seen;
static int trace = -1;

/* Below that folder, from call number `at` on; `every` counts openings for reading too, and nothing but openings. */
void chaos_arm(const char *below, int what, long number, int error, int openings, const char *log) {
    snprintf(folder, sizeof folder, "%s", below);
    at = number, seen = 0, failure = error, every = openings;
    trace = log[0] ? open(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    mode = what;
}

long chaos_seen(void) { return seen; }

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* The whole path of `path` under the descriptor of a folder, or of the descriptor itself where `path` is NULL. */
static const char *whole(int dir, const char *path, char *buffer, size_t size) {
    if (path && (path[0] == '/' || dir == AT_FDCWD)) return path;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t got = readlink(link, buffer, size - 1);
    if (got < 0) return "";
    buffer[got] = 0;
    if (path) snprintf(buffer + got, size - got, "/%s", path);
    return buffer;
}

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Before a call: 0 lets it pass, HALF and AFTER are for the caller to do, -1 means that it has failed with errno. */
static int gate(const char *call, int dir, const char *path) {
    char buffer[4096];
    if (mode == OFF) return 0;
    int kept = errno;
    const char *place = whole(dir, path, buffer, sizeof buffer);
    errno = kept;
    if (strncmp(place, folder, strlen(folder))) return 0;
    long now = __sync_add_and_fetch(&seen, 1);
    if (trace >= 0) {
        char line[4352];
        int size = snprintf(line, sizeof line, "%ld %s %s\n", now, call, place);
        ssize_t (*plain)(int, const void *, size_t) = real("write");
        if (plain(trace, line, size) < 0) errno = kept;
    }
    int hit = mode == FAIL_FROM || mode == SHORT ? now >= at : now == at;
    if (!hit) return 0;
    if (mode == BEFORE) end();
    if (mode == STOP) kill(getpid(), SIGSTOP);
    if (mode == FAIL_FROM || mode == FAIL_ONCE) {
        if (failure == ENOSPC && (!strcmp(call, "unlink") || !strcmp(call, "rmdir"))) return 0;
        errno = failure;
        return -1;
    }
    return mode == AFTER || mode == HALF || mode == SHORT ? mode : 0;
}

static int opens(int flags) { return every ? 1 : (flags & (O_CREAT | O_TRUNC)) != 0; }

#define PASS(type, made) \
    do { \
        if (what < 0) return -1; \
        type result = made; \
        if (what == AFTER || what == HALF) end(); \
        return result; \
    } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        int (*plain)(const char *, int, ...) = real(#name); \
        int what = opens(flags) ? gate("open", AT_FDCWD, path) : 0; \
        PASS(int, plain(path, flags, bits)); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        int bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        int (*plain)(int, const char *, int, ...) = real(#name); \
        int what = opens(flags) ? gate("open", dir, path) : 0; \
        PASS(int, plain(dir, path, flags, bits)); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*plain)(int, const void *, size_t) = real("write");
    int what = every ? 0 : gate("write", fd, NULL);
    if ((what == HALF || what == SHORT) && size > 1) size /= 2;
    PASS(ssize_t, plain(fd, data, size));
}

#define PWRITE(name, offset) \
    ssize_t name(int fd, const void *data, size_t size, offset place) { \
        ssize_t (*plain)(int, const void *, size_t, offset) = real(#name); \
        int what = every ? 0 : gate("write", fd, NULL); \
        if ((what == HALF || what == SHORT) && size > 1) size /= 2; \
        PASS(ssize_t, plain(fd, data, size, place)); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count) {
    ssize_t (*plain)(int, const struct iovec *, int) = real("writev");
    int what = every ? 0 : gate("write", fd, NULL);
    if ((what == HALF || what == SHORT) && count > 1) count /= 2;
    PASS(ssize_t, plain(fd, parts, count));
}

/* name, what the log calls it, parameters, arguments, and where its path is */
#define CHANGE(name, log, parameters, arguments, dir, path) \
    int name parameters { \
        int(*plain) parameters = real(#name); \
        int what = every ? 0 : gate(log, dir, path); \
        PASS(int, plain arguments); \
    }
CHANGE(rename, "rename", (const char *a, const char *b), (a, b), AT_FDCWD, b)
CHANGE(renameat, "rename", (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
CHANGE(renameat2, "rename", (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f), e, b)
CHANGE(unlink, "unlink", (const char *a), (a), AT_FDCWD, a)
CHANGE(unlinkat, "unlink", (int d, const char *a, int f), (d, a, f), d, a)
CHANGE(rmdir, "rmdir", (const char *a), (a), AT_FDCWD, a)
CHANGE(mkdir, "mkdir", (const char *a, mode_t m), (a, m), AT_FDCWD, a)
CHANGE(mkdirat, "mkdir", (int d, const char *a, mode_t m), (d, a, m), d, a)
CHANGE(fsync, "fsync", (int d), (d), d, NULL)
CHANGE(fdatasync, "fsync", (int d), (d), d, NULL)
CHANGE(ftruncate, "truncate", (int d, off_t n), (d, n), d, NULL)
CHANGE(ftruncate64, "truncate", (int d, off64_t n), (d, n), d, NULL)
CHANGE(utimensat, "utime", (int d, const char *a, const struct timespec t[2], int f), (d, a, t, f), d, a)
