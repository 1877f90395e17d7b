/* AMX in user space, and poisoned memory, for a process that preloads this (LD_PRELOAD).
 *
 * With EMULATE_AMX set, in Python on x86-64 Linux with AVX-512 and a processor that can fault on
 * CPUID: CPUID says that AMX-TILE, AMX-INT8 and AMX-BF16 are there, the kernel's permission for the
 * tiles is granted, and tile instructions, which come as illegal ones, are executed here. So a
 * library takes the path that it takes on a processor with AMX, slowly.
 *
 * With POISON_ALLOCATIONS set, memory of posix_memalign (that of torch and oneDNN) and what lies
 * behind it is filled with 0xFF, which is NaN in every floating-point format.
 *
 * Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (the instructions)
 * and volume 1, chapter 18 (the tiles and their configuration).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define ARCH_GET_XCOMP_SUPP 0x1021
#define ARCH_GET_XCOMP_PERM 0x1022
#define ARCH_REQ_XCOMP_PERM 0x1023
#define TILE_FEATURES (3UL << 17)

enum { NUM_TILES = 8, MAX_ROWS = 16, ROW_BYTES = 64 };

static __thread __attribute__((tls_model("initial-exec"), aligned(64)))
uint8_t tiles[NUM_TILES][MAX_ROWS][ROW_BYTES];
static __thread __attribute__((tls_model("initial-exec"), aligned(64))) uint8_t config[64];

static struct sigaction others[65];
static int is_ready;

static long raw_syscall(long number, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* ---- CPUID ---- */

static void emulate_cpuid(greg_t *gregs) {
    uint32_t leaf = (uint32_t)gregs[REG_RAX], subleaf = (uint32_t)gregs[REG_RCX];
    uint32_t a = leaf, b, c = subleaf, d;
    raw_syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1, 0, 0, 0, 0);
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (leaf == 0) {
        if (a < 0x1E) a = 0x1E;
    } else if (leaf == 7 && subleaf == 0) {
        d |= 1u << 22 | 1u << 24 | 1u << 25;
    } else if (leaf == 0xD && subleaf == 0) {
        a |= TILE_FEATURES;
    } else if (leaf == 0xD && subleaf == 17) {
        a = 64, b = 2752, c = 2, d = 0;
    } else if (leaf == 0xD && subleaf == 18) {
        a = 8192, b = 2816, c = 6, d = 0;
    } else if (leaf == 0x1D) {
        a = subleaf == 0, b = c = d = 0;
        if (subleaf == 1) a = 8192 | 1024u << 16, b = ROW_BYTES | NUM_TILES << 16, c = MAX_ROWS;
    } else if (leaf == 0x1E) {
        a = c = d = 0, b = 16 | 64 << 8;
    }
    raw_syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0, 0, 0, 0, 0);
    gregs[REG_RAX] = a, gregs[REG_RBX] = b, gregs[REG_RCX] = c, gregs[REG_RDX] = d;
}

long syscall(long number, ...) {
    va_list list;
    va_start(list, number);
    long args[6];
    for (int i = 0; i < 6; i++) args[i] = va_arg(list, long);
    va_end(list);
    if (is_ready && number == SYS_arch_prctl) {
        if (args[0] == ARCH_REQ_XCOMP_PERM && (args[1] == 17 || args[1] == 18)) return 0;
        if (args[0] == ARCH_GET_XCOMP_PERM || args[0] == ARCH_GET_XCOMP_SUPP) {
            *(uint64_t *)args[1] = TILE_FEATURES | 0xE7;
            return 0;
        }
    }
    long result = raw_syscall(number, args[0], args[1], args[2], args[3], args[4], args[5]);
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

/* ---- Tiles ---- */

static int num_rows(int tile) { return config[48 + tile]; }

static int row_bytes(int tile) {
    uint16_t bytes;
    memcpy(&bytes, config + 16 + 2 * tile, 2);
    return bytes;
}

/* Pairs of bfloat16: sums of even and of odd places apart, by FMA, subnormals taken and given as 0,
 * whatever the thread's own setting is. */
__attribute__((target("avx512f"))) static void dot_bfloat16(int out, int left, int right) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(0x1F80 | 0x8040);
    __m512i high = _mm512_set1_epi32((int)0xFFFF0000);
    int num_pairs = row_bytes(left) / 4;
    __mmask16 wanted = (__mmask16)((1u << (row_bytes(out) / 4)) - 1);
    for (int m = 0; m < num_rows(out); m++) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int k = 0; k < num_pairs; k++) {
            uint32_t pair;
            memcpy(&pair, tiles[left][m] + 4 * k, 4);
            __m512i row = _mm512_load_si512(tiles[right][k]);
            __m512 left_even = _mm512_castsi512_ps(_mm512_set1_epi32((int)(pair << 16)));
            __m512 left_odd = _mm512_castsi512_ps(_mm512_set1_epi32((int)(pair & 0xFFFF0000)));
            __m512 right_even = _mm512_castsi512_ps(_mm512_slli_epi32(row, 16));
            __m512 right_odd = _mm512_castsi512_ps(_mm512_and_si512(row, high));
            even = _mm512_fmadd_ps(left_even, right_even, even);
            odd = _mm512_fmadd_ps(left_odd, right_odd, odd);
        }
        __m512 sum = _mm512_add_ps(_mm512_load_ps(tiles[out][m]), _mm512_add_ps(even, odd));
        _mm512_store_ps(tiles[out][m], _mm512_maskz_mov_ps(wanted, sum));
    }
    _mm_setcsr(before);
}

static void dot_bytes(int out, int left, int right, int left_signed, int right_signed) {
    for (int m = 0; m < num_rows(out); m++)
        for (int n = 0; n < row_bytes(out) / 4; n++) {
            uint32_t sum;
            memcpy(&sum, tiles[out][m] + 4 * n, 4);
            for (int k = 0; k < row_bytes(left); k++) {
                uint8_t x = tiles[left][m][k], y = tiles[right][k / 4][4 * n + k % 4];
                sum += (uint32_t)((left_signed ? (int8_t)x : x) * (right_signed ? (int8_t)y : y));
            }
            memcpy(tiles[out][m] + 4 * n, &sum, 4);
        }
}

static const int registers[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

/* One tile instruction; false where the next one is none, and nothing has changed. */
static int emulate_tile_instruction(greg_t *gregs) {
    const uint8_t *code = (const uint8_t *)gregs[REG_RIP];
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84)) return 0; /* 0F38, W0, 128 */
    int prefix = code[2] & 3, operand = ~(code[2] >> 3) & 15, opcode = code[3], modrm = code[4];
    enum { NONE, P66, PF3, PF2 };
    int mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
    if (mod == 3) {
        gregs[REG_RIP] += 5;
        if (opcode == 0x49 && prefix == NONE && modrm == 0xC0) {
            memset(config, 0, sizeof config);
            memset(tiles, 0, sizeof tiles);
        } else if (opcode == 0x49 && prefix == PF2 && rm == 0) {
            memset(tiles[reg], 0, sizeof tiles[reg]);
        } else if (opcode == 0x5C && prefix == PF3) {
            dot_bfloat16(reg, rm, operand);
        } else if (opcode == 0x5E) {
            dot_bytes(reg, rm, operand, prefix == PF2 || prefix == PF3,
                      prefix == PF2 || prefix == P66);
        } else {
            gregs[REG_RIP] -= 5;
            return 0;
        }
        return 1;
    }
    if (opcode != 0x49 && opcode != 0x4B) return 0;
    const uint8_t *next = code + 5;
    uint64_t address = 0, stride = 0;
    int base = rm;
    if (rm == 4) {
        int index = (*next >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
        if (index != 4) stride = (uint64_t)gregs[registers[index]] << (*next >> 6);
        base = *next++ & 7;
    }
    int is_based = !(base == 5 && mod == 0);
    if (is_based) address = (uint64_t)gregs[registers[base | (code[1] & 0x20 ? 0 : 8)]];
    if (mod == 1) {
        address += (uint64_t)(int64_t)(int8_t)*next++;
    } else if (mod == 2 || !is_based) {
        int32_t offset;
        memcpy(&offset, next, 4);
        address += (uint64_t)(int64_t)offset;
        next += 4;
        if (!is_based && rm != 4) address += (uint64_t)next; /* relative to what follows */
    }
    if (opcode == 0x49 && reg == 0 && prefix == NONE) {
        memcpy(config, (const void *)address, sizeof config);
        memset(tiles, 0, sizeof tiles);
    } else if (opcode == 0x49 && reg == 0 && prefix == P66) {
        memcpy((void *)address, config, sizeof config);
    } else if (opcode == 0x4B && (prefix == PF2 || prefix == P66)) {
        memset(tiles[reg], 0, sizeof tiles[reg]);
        for (int m = 0; m < num_rows(reg); m++)
            memcpy(tiles[reg][m], (const void *)(address + stride * (uint64_t)m),
                   (size_t)row_bytes(reg));
    } else if (opcode == 0x4B && prefix == PF3) {
        for (int m = 0; m < num_rows(reg); m++)
            memcpy((void *)(address + stride * (uint64_t)m), tiles[reg][m], (size_t)row_bytes(reg));
    } else {
        return 0;
    }
    gregs[REG_RIP] = (greg_t)next;
    return 1;
}

/* ---- Signals ---- */

static void handle(int number, siginfo_t *info, void *opaque) {
    greg_t *gregs = ((ucontext_t *)opaque)->uc_mcontext.gregs;
    if (number == SIGILL && emulate_tile_instruction(gregs)) {
        while (emulate_tile_instruction(gregs)) {}
        return;
    }
    /* A CPUID that faults comes from the kernel, without an address: only then is code readable. */
    if (number == SIGSEGV && info->si_code == SI_KERNEL) {
        const uint8_t *code = (const uint8_t *)gregs[REG_RIP];
        if (code[0] == 0x0F && code[1] == 0xA2) {
            emulate_cpuid(gregs);
            gregs[REG_RIP] += 2;
            return;
        }
    }
    struct sigaction *other = &others[number];
    if (other->sa_flags & SA_SIGINFO) {
        other->sa_sigaction(number, info, opaque);
    } else if (other->sa_handler != SIG_DFL && other->sa_handler != SIG_IGN) {
        other->sa_handler(number);
    } else {
        /* As nobody else wants it: the instruction is tried again and ends the process. */
        struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } plain = {0};
        raw_syscall(SYS_rt_sigaction, number, (long)&plain, 0, 8, 0, 0);
    }
}

typedef int (*sigaction_function)(int, const struct sigaction *, struct sigaction *);

/* Handlers of others for these two signals come second. */
int sigaction(int number, const struct sigaction *restrict new, struct sigaction *restrict old) {
    static sigaction_function real;
    if (!real) real = (sigaction_function)dlsym(RTLD_NEXT, "sigaction");
    if (!is_ready || (number != SIGSEGV && number != SIGILL)) return real(number, new, old);
    struct sigaction before = others[number];
    if (new) others[number] = *new;
    if (old) *old = before;
    return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
    struct sigaction new = {.sa_handler = handler, .sa_flags = SA_RESTART}, old;
    return sigaction(number, &new, &old) ? SIG_ERR : old.sa_handler;
}

/* Only Python: programs in Go, such as wandb's, set their signal handlers past the C library. */
static int is_python(void) {
    char path[4096] = {0};
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    const char *name = length > 0 ? strrchr(path, '/') : NULL;
    return name != NULL && strncmp(name, "/python", 7) == 0;
}

__attribute__((constructor)) static void start(void) {
    if (!getenv("EMULATE_AMX") || !is_python()) return;
    struct sigaction own = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &own, &others[SIGILL]);
    sigaction(SIGSEGV, &own, &others[SIGSEGV]);
    is_ready = 1;
    raw_syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0, 0, 0, 0, 0);
}

/* ---- Memory ---- */

enum { BEHIND = 4096 };

int posix_memalign(void **out, size_t alignment, size_t size) {
    static int (*real)(void **, size_t, size_t);
    static int is_poisoned = -1;
    if (!real) real = (int (*)(void **, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
    if (is_poisoned < 0) is_poisoned = getenv("POISON_ALLOCATIONS") != NULL;
    if (is_poisoned) size += BEHIND;
    int result = real(out, alignment, size);
    if (result == 0 && is_poisoned) memset(*out, 0xFF, size);
    return result;
}
