// Matrix products of one warp, and the transposition of their operands (PTX ISA, "mma", "movmatrix", "prmt").
#pragma once
#include "types.cuh"

// d += A B: A 16 x 16, B 16 x 8, d 16 x 8. With g = lane / 4 and t = lane % 4 a lane holds
//   a0, a2: row g, columns 2 t + {0, 1} and + 8;  a1, a3: the same of row g + 8;
//   b0, b1: column g, rows 2 t + {0, 1} and + 8;  d: row g, columns 2 t + {0, 1}, then row g + 8.
template <class T>
void mma_16x8x16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1);
template <>
void mma_16x8x16<Bf16>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
void mma_16x8x16<Fp16>(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit elements, of which a lane holds row lane / 4, columns 2 (lane % 4) + {0, 1}: transposed.
u32 transpose_8x8(u32 pair) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// The low halves of two registers, and the high halves.
u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }
