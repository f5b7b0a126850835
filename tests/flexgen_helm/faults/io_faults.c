/* Reads and writes that fail: loaded before libc, told what to do by $FAULT_IO, "KIND:NUMBER:PART".

   From the NUMBERth call on files whose name has PART in it, reads fail (`bad-read`) or bring less than was asked for
   (`short-read`), writes fail (`bad-write`) or find the disk full (`full`). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;

/* Whether a call on this file is to fail as `kind` says; an `errno`, or -1 for a short one, 0 for none. */
static int fault_of(int file, int is_write) {
    const char *told = getenv("FAULT_IO");
    if (!told || !*told) return 0;
    char kind[16], part[256], link[64], name[4096];
    long first;
    if (sscanf(told, "%15[^:]:%ld:%255s", kind, &first, part) != 3) return 0;
    if (is_write != (!strcmp(kind, "bad-write") || !strcmp(kind, "full"))) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    if (!strstr(name, part) || atomic_fetch_add(&calls, 1) + 1 < first) return 0;
    return !strcmp(kind, "full") ? ENOSPC : !strcmp(kind, "short-read") ? -1 : EIO;
}

static size_t shorter(int file, size_t count) {
    if (count >= 8192) return (count / 2) & ~(size_t)4095;
    return count > 1 && !(fcntl(file, F_GETFL) & O_DIRECT) ? count / 2 : count;
}

#define NEXT(name) __typeof__(&name) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(is_write) \
    int fault = fault_of(file, is_write); \
    if (fault > 0) { errno = fault; return -1; }

#define READ(name, offset_type) \
    ssize_t name(int file, void *into, size_t count, offset_type at) { \
        NEXT(name); FAIL(0) \
        return next(file, into, fault ? shorter(file, count) : count, at); \
    }
READ(pread, off_t)
READ(pread64, off64_t)

ssize_t read(int file, void *into, size_t count) {
    NEXT(read); FAIL(0)
    return next(file, into, fault ? shorter(file, count) : count);
}

#define READV(name, offset_type) \
    ssize_t name(int file, const struct iovec *parts, int number, offset_type at) { \
        NEXT(name); FAIL(0) \
        if (!fault) return next(file, parts, number, at); \
        struct iovec part = {parts[0].iov_base, shorter(file, parts[0].iov_len)}; \
        return next(file, &part, 1, at); \
    }
READV(preadv, off_t)
READV(preadv64, off64_t)

ssize_t write(int file, const void *from, size_t count) {
    NEXT(write); FAIL(1)
    return next(file, from, count);
}

#define WRITE(name, offset_type) \
    ssize_t name(int file, const void *from, size_t count, offset_type at) { \
        NEXT(name); FAIL(1) \
        return next(file, from, count, at); \
    }
WRITE(pwrite, off_t)
WRITE(pwrite64, off64_t)

#define WRITEV(name, offset_type) \
    ssize_t name(int file, const struct iovec *parts, int number, offset_type at) { \
        NEXT(name); FAIL(1) \
        return next(file, parts, number, at); \
    }
WRITEV(pwritev, off_t)
WRITEV(pwritev64, off64_t)

int fsync(int file) { NEXT(fsync); FAIL(1) return next(file); }
int fdatasync(int file) { NEXT(fdatasync); FAIL(1) return next(file); }

#define CLAIM(name, offset_type) \
    int name(int file, offset_type first, offset_type count) { \
        NEXT(name); \
        int fault = fault_of(file, 1); \
        return fault > 0 ? fault : next(file, first, count); \
    }
CLAIM(posix_fallocate, off_t)
CLAIM(posix_fallocate64, off64_t)
