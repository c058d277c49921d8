/* Loads and stores of f32, f16 and bf16 as f32 lanes, and loads of FP8 (E4M3 as 2^-8 of it: see vf_load_fp8). The type
 * is a constant after inlining. */

CKV_INLINE vf vf_load_as(const void *p, uint32_t type) {
  if (type >= CKV_BYTES_E4M3) return vf_load_fp8(p, VN, type == CKV_BYTES_E4M3);
  return type == CKV_F32 ? vf_load(p) : type == CKV_F16 ? vf_load_f16(p) : vf_load_bf16(p);
}
CKV_INLINE vf vf_load_as_n(const void *p, uint32_t type, uint32_t n) {
  if (n == VN) return vf_load_as(p, type);
  if (type >= CKV_BYTES_E4M3) return vf_load_fp8(p, n, type == CKV_BYTES_E4M3);
  return type == CKV_F32 ? vf_load_n(p, n) : type == CKV_F16 ? vf_load_f16_n(p, n) : vf_load_bf16_n(p, n);
}
CKV_INLINE void vf_store_as_n(void *p, uint32_t type, vf x, uint32_t n) {
  if (type == CKV_F32) vf_store_n(p, x, n);
  else if (type == CKV_F16) vf_store_f16_n(p, x, n);
  else vf_store_bf16_n(p, x, n);
}
/* One element in every lane, without a detour through memory. */
CKV_INLINE vf vf_set1_as(const void *p, uint32_t type) {
  return type == CKV_F16 ? vf_set1_f16(p) : vf_set1(ckv_load_scalar(p, type, 0));
}
