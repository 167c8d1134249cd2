// Preloaded in front of libc: counts what is done to the files under one folder, and at the n-th event kills the
// process or lets the disk be full from then on. Each event goes to a log, one per line.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, FULL, SYNC_FAILS };

static char under[PATH_MAX];
static long number, target;
static int action, log_handle = -1, full;

void disk_watch(const char* folder, int what, long at, int log) {
  snprintf(under, sizeof under, "%s", folder);
  action = what;
  target = at;
  log_handle = log;
  number = 0;
  full = 0;
}

long disk_events(void) { return number; }

static int inside(const char* path) { return *under && strncmp(path, under, strlen(under)) == 0; }

static int of_handle(int handle, char* path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = syscall(SYS_readlink, link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return inside(path);
}

static int of_name(int folder, const char* name, char* path) {
  if (!*under) return 0;
  if (*name == '/' || folder == AT_FDCWD) {
    snprintf(path, PATH_MAX, "%s", name);
    return inside(path);
  }
  if (!of_handle(folder, path)) return 0;
  size_t length = strlen(path);
  snprintf(path + length, PATH_MAX - length, "/%s", name);
  return 1;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

// True where this event is the last one. Whoever can leave half of its work behind does so, then dies.
static int event(const char* kind, const char* path, const char* second) {
  char line[2 * PATH_MAX + 16];
  int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, path, second);
  if (log_handle >= 0) syscall(SYS_write, log_handle, line, length);
  int hit = ++number == target;
  if (hit && action == FULL) full = 1;
  return hit && action == KILL;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL_IF_FULL \
  if (full) return errno = ENOSPC, -1

ssize_t write(int handle, const void* data, size_t size) {
  REAL(write);
  char path[PATH_MAX];
  if (!*under || !of_handle(handle, path)) return real(handle, data, size);
  int last = event("write", path, "");
  if (full && size > 1) real(handle, data, size / 2);  // what fits
  FAIL_IF_FULL;
  if (last) {
    real(handle, data, size / 2);
    die();
  }
  return real(handle, data, size);
}

ssize_t writev(int handle, const struct iovec* parts, int count) {
  REAL(writev);
  char path[PATH_MAX];
  if (!*under || !of_handle(handle, path)) return real(handle, parts, count);
  int last = event("write", path, "");
  FAIL_IF_FULL;
  if (last) {
    real(handle, parts, 1);
    die();
  }
  return real(handle, parts, count);
}

#define PWRITE(name)                                                                  \
  ssize_t name(int handle, const void* data, size_t size, off_t offset) {             \
    REAL(name);                                                                       \
    char path[PATH_MAX];                                                              \
    if (!*under || !of_handle(handle, path)) return real(handle, data, size, offset); \
    if (event("write", path, "")) die();                                              \
    FAIL_IF_FULL;                                                                     \
    return real(handle, data, size, offset);                                          \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

#define ON_HANDLE(name)                                           \
  int name(int handle) {                                          \
    REAL(name);                                                   \
    char path[PATH_MAX];                                          \
    if (!*under || !of_handle(handle, path)) return real(handle); \
    if (event("sync", path, "")) die();                           \
    if (action == SYNC_FAILS) return errno = EIO, -1;             \
    return real(handle);                                          \
  }
ON_HANDLE(fsync)
ON_HANDLE(fdatasync)

#define OPEN(name)                                                        \
  int name(const char* file, int flags, ...) {                            \
    REAL(name);                                                           \
    char path[PATH_MAX];                                                  \
    mode_t mode = 0;                                                      \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                \
      va_list rest;                                                       \
      va_start(rest, flags);                                              \
      mode = va_arg(rest, mode_t);                                        \
      va_end(rest);                                                       \
    }                                                                     \
    if ((flags & (O_CREAT | O_TRUNC)) && of_name(AT_FDCWD, file, path)) { \
      if (event("open", path, "")) die();                                 \
      FAIL_IF_FULL;                                                       \
    }                                                                     \
    return real(file, flags, mode);                                       \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
  int name(int folder, const char* file, int flags, ...) {              \
    REAL(name);                                                         \
    char path[PATH_MAX];                                                \
    mode_t mode = 0;                                                    \
    if (flags & (O_CREAT | __O_TMPFILE)) {                              \
      va_list rest;                                                     \
      va_start(rest, flags);                                            \
      mode = va_arg(rest, mode_t);                                      \
      va_end(rest);                                                     \
    }                                                                   \
    if ((flags & (O_CREAT | O_TRUNC)) && of_name(folder, file, path)) { \
      if (event("open", path, "")) die();                               \
      FAIL_IF_FULL;                                                     \
    }                                                                   \
    return real(folder, file, flags, mode);                             \
  }
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char* name, mode_t mode) {
  REAL(mkdir);
  char path[PATH_MAX];
  if (of_name(AT_FDCWD, name, path)) {
    if (event("mkdir", path, "")) die();
    FAIL_IF_FULL;
  }
  return real(name, mode);
}

int rename(const char* from, const char* to) {
  REAL(rename);
  char path[PATH_MAX];
  if (of_name(AT_FDCWD, from, path) && event("rename", path, to)) die();
  return real(from, to);
}

int unlink(const char* name) {
  REAL(unlink);
  char path[PATH_MAX];
  if (of_name(AT_FDCWD, name, path) && event("unlink", path, "")) die();
  return real(name);
}

int unlinkat(int folder, const char* name, int flags) {
  REAL(unlinkat);
  char path[PATH_MAX];
  if (of_name(folder, name, path) && event("unlink", path, "")) die();
  return real(folder, name, flags);
}

int rmdir(const char* name) {
  REAL(rmdir);
  char path[PATH_MAX];
  if (of_name(AT_FDCWD, name, path) && event("unlink", path, "")) die();
  return real(name);
}
