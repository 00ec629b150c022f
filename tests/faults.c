/* A layer between a program and the C library, in which calls about files fail, or end the program, on request.

   LD_PRELOAD puts it there. `watch_files` starts to count the calls about files below a directory; the call with a given
   number then ends in an error, or a signal. tests/faults.py uses it. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READS = 0, CHANGES = 1, GROWS = 2 }; /* what a call may do: a full disk is noticed by those that grow */

static char watched[PATH_MAX];
static size_t watched_length;
static int fault;        /* an error number; or minus the number of a signal; 0: none */
static long at;          /* the number of the call that fails, from 1 */
static int stays;        /* all later calls that a full or broken disk would refuse fail, too */
static int no_exchange;  /* as on a file system that cannot exchange two directories */
static int log_to = -1;  /* a descriptor for a line per call */
static atomic_long calls;

void watch_files(const char *below, int fault_, long at_, int stays_, int no_exchange_, int log_to_) {
    strncpy(watched, below, sizeof watched - 1);
    watched_length = strlen(watched);
    fault = fault_, at = at_, stays = stays_, no_exchange = no_exchange_, log_to = log_to_;
    calls = 0;
}

long watched_calls(void) { return calls; }

static int is_below(const char *path) {
    return watched_length && path && !strncmp(path, watched, watched_length);
}

static const char *path_of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, buffer, PATH_MAX - 1);
    buffer[length < 0 ? 0 : length] = 0;
    return buffer;
}

static const char *path_at(int directory, const char *path, char *buffer) {
    if (!path || path[0] == '/' || directory == AT_FDCWD) return path;
    path_of(directory, buffer);
    size_t length = strlen(buffer);
    snprintf(buffer + length, PATH_MAX - length, "/%s", path);
    return buffer;
}

/* Whether the call must fail; errno says how. */
static int fails(const char *name, int kind, const char *path, const char *other) {
    if (!is_below(path) && !is_below(other)) return 0;
    if (kind != GROWS && fault == ENOSPC) return 0;
    if (kind == READS && fault == -SIGKILL) return 0; /* leaves the same as one at the change before */
    long number = ++calls;
    if (log_to >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", number, name, path ? path : "", other ? other : "");
        syscall(SYS_write, log_to, line, length);
    }
    if (!fault || number < at || (number > at && !stays)) return 0;
    if (fault < 0) {
        if (number == at) syscall(SYS_kill, getpid(), -fault);
        return 0;
    }
    if (number > at && kind == READS) return 0; /* a broken disk takes nothing more, but the rest can be read */
    if (number > at && !strncmp(name, "unlink", 6)) return 0;
    errno = fault;
    return 1;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list more; \
        va_start(more, flags); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
#define KIND(flags) ((flags) & O_CREAT ? GROWS : READS)

int open64(const char *path, int flags, ...) {
    REAL(int, "open64", const char *, int, ...);
    MODE(flags)
    return fails(flags & O_CREAT ? "create" : "open", KIND(flags), path, 0) ? -1 : real(path, flags, mode);
}
int open(const char *path, int flags, ...) {
    REAL(int, "open", const char *, int, ...);
    MODE(flags)
    return fails(flags & O_CREAT ? "create" : "open", KIND(flags), path, 0) ? -1 : real(path, flags, mode);
}
int openat64(int directory, const char *path, int flags, ...) {
    REAL(int, "openat64", int, const char *, int, ...);
    MODE(flags)
    char buffer[PATH_MAX];
    const char *whole = path_at(directory, path, buffer);
    return fails(flags & O_CREAT ? "create" : "open", KIND(flags), whole, 0) ? -1 : real(directory, path, flags, mode);
}

#define WITH_DESCRIPTOR(result, name, kind, parameters, ...) \
    { \
        REAL(result, name, parameters); \
        char buffer[PATH_MAX]; \
        if (watched_length && fails(name, kind, path_of(descriptor, buffer), 0)) return -1; \
        return real(__VA_ARGS__); \
    }
#define COMMA ,

ssize_t read(int descriptor, void *to, size_t count)
WITH_DESCRIPTOR(ssize_t, "read", READS, int COMMA void * COMMA size_t, descriptor, to, count)
ssize_t pread64(int descriptor, void *to, size_t count, off64_t offset)
WITH_DESCRIPTOR(ssize_t, "pread64", READS, int COMMA void * COMMA size_t COMMA off64_t, descriptor, to, count, offset)
ssize_t write(int descriptor, const void *from, size_t count)
WITH_DESCRIPTOR(ssize_t, "write", GROWS, int COMMA const void * COMMA size_t, descriptor, from, count)
ssize_t pwrite64(int descriptor, const void *from, size_t count, off64_t offset)
WITH_DESCRIPTOR(ssize_t, "pwrite64", GROWS, int COMMA const void * COMMA size_t COMMA off64_t, descriptor, from, count, offset)
ssize_t writev(int descriptor, const struct iovec *parts, int count)
WITH_DESCRIPTOR(ssize_t, "writev", GROWS, int COMMA const struct iovec * COMMA int, descriptor, parts, count)
int ftruncate64(int descriptor, off64_t length)
WITH_DESCRIPTOR(int, "ftruncate64", GROWS, int COMMA off64_t, descriptor, length)
int fsync(int descriptor)
WITH_DESCRIPTOR(int, "fsync", GROWS, int, descriptor)
int fdatasync(int descriptor)
WITH_DESCRIPTOR(int, "fdatasync", GROWS, int, descriptor)
int flock(int descriptor, int operation)
WITH_DESCRIPTOR(int, "flock", READS, int COMMA int, descriptor, operation)
int fstat64(int descriptor, struct stat64 *status)
WITH_DESCRIPTOR(int, "fstat64", READS, int COMMA struct stat64 *, descriptor, status)
int fchmod(int descriptor, mode_t mode)
WITH_DESCRIPTOR(int, "fchmod", CHANGES, int COMMA mode_t, descriptor, mode)
ssize_t sendfile64(int descriptor, int from, off64_t *offset, size_t count)
WITH_DESCRIPTOR(ssize_t, "sendfile64", GROWS, int COMMA int COMMA off64_t * COMMA size_t, descriptor, from, offset, count)

int close(int descriptor) { /* is closed whether it fails or not */
    REAL(int, "close", int);
    char buffer[PATH_MAX];
    int broken = watched_length && fails("close", CHANGES, path_of(descriptor, buffer), 0), code = errno;
    int result = real(descriptor);
    if (broken) errno = code;
    return broken ? -1 : result;
}

#define WITH_PATH(result, failed, name, kind, parameters, ...) \
    { \
        REAL(result, name, parameters); \
        return fails(name, kind, path, 0) ? failed : real(__VA_ARGS__); \
    }

int stat64(const char *path, struct stat64 *status)
WITH_PATH(int, -1, "stat64", READS, const char * COMMA struct stat64 *, path, status)
int lstat64(const char *path, struct stat64 *status)
WITH_PATH(int, -1, "lstat64", READS, const char * COMMA struct stat64 *, path, status)
int mkdir(const char *path, mode_t mode)
WITH_PATH(int, -1, "mkdir", GROWS, const char * COMMA mode_t, path, mode)
int rmdir(const char *path)
WITH_PATH(int, -1, "rmdir", CHANGES, const char *, path)
int unlink(const char *path)
WITH_PATH(int, -1, "unlink", CHANGES, const char *, path)
int chmod(const char *path, mode_t mode)
WITH_PATH(int, -1, "chmod", CHANGES, const char * COMMA mode_t, path, mode)
int chown(const char *path, uid_t owner, gid_t group)
WITH_PATH(int, -1, "chown", CHANGES, const char * COMMA uid_t COMMA gid_t, path, owner, group)
DIR *opendir(const char *path)
WITH_PATH(DIR *, NULL, "opendir", READS, const char *, path)
ssize_t readlink(const char *path, char *to, size_t size)
WITH_PATH(ssize_t, -1, "readlink", READS, const char * COMMA char * COMMA size_t, path, to, size)

int unlinkat(int directory, const char *path, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char buffer[PATH_MAX];
    const char *name = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return fails(name, CHANGES, path_at(directory, path, buffer), 0) ? -1 : real(directory, path, flags);
}
int fstatat64(int directory, const char *path, struct stat64 *status, int flags) {
    REAL(int, "fstatat64", int, const char *, struct stat64 *, int);
    char buffer[PATH_MAX];
    return fails("stat64", READS, path_at(directory, path, buffer), 0) ? -1 : real(directory, path, status, flags);
}
int rename(const char *path, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return fails("rename", GROWS, path, to) ? -1 : real(path, to);
}
int renameat2(int from, const char *path, int at_, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    if (no_exchange) {
        errno = ENOSYS;
        return -1;
    }
    return fails(flags & 2 ? "exchange" : "rename", GROWS, path, to) ? -1 : real(from, path, at_, to, flags);
}
