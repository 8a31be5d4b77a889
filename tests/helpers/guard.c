/* Preloaded into a process, finds writes past the ends of aligned blocks of memory: torch's tensors and oneDNN's scratch.
   Each block lies between two guards of a known pattern; freeing it prints a line of JSON if a guard has changed. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define GUARD 8192
#define PATTERN 0xA5
#define MAGIC 0x5afe5afe5afe5afeULL

typedef struct { uint64_t mark; void *base; size_t size, unused; } Head; /* directly before the block */

extern void __libc_free(void *);
extern void *__libc_memalign(size_t, size_t);

int posix_memalign(void **out, size_t alignment, size_t size) {
    size_t before = alignment > GUARD ? alignment : GUARD;
    if (size > SIZE_MAX - before - GUARD) return ENOMEM;
    char *base = __libc_memalign(alignment < 64 ? 64 : alignment, before + size + GUARD);
    if (!base) return ENOMEM;
    char *block = base + before;
    memset(block - GUARD, PATTERN, GUARD - sizeof(Head));
    memset(block + size, PATTERN, GUARD);
    *(Head *)(block - sizeof(Head)) = (Head){(uint64_t)block ^ MAGIC, base, size, 0};
    *out = block;
    return 0;
}

static int changed(const unsigned char *guard, size_t length) {
    size_t last = 0;
    for (size_t i = 0; i < length; i++)
        if (guard[i] != PATTERN) last = i + 1;
    return (int)last;
}

void free(void *block) {
    if (!block) return;
    Head *head = (Head *)((char *)block - sizeof(Head));
    if (((uintptr_t)block & 63) || head->mark != ((uint64_t)block ^ MAGIC)) { __libc_free(block); return; }
    int after = changed((unsigned char *)block + head->size, GUARD);
    int before = changed((unsigned char *)block - GUARD, GUARD - sizeof(Head));
    if (after || before) {
        char line[120];
        int length = snprintf(line, sizeof line, "{\"past\": %d, \"before\": %d, \"size\": %zu}\n", after, before, head->size);
        if (write(1, line, (size_t)length) < 0) _exit(1);
    }
    head->mark = 0;
    __libc_free(head->base);
}
