// Integer names, element-type tags, and the opaque TMA descriptor. Device code includes no CUDA header.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

struct Bf16 {};
struct Fp16 {};

// CUtensorMap: 128 opaque bytes that the host encodes. A kernel takes it as `const __grid_constant__`.
struct alignas(64) TensorMap { u64 opaque[16]; };
