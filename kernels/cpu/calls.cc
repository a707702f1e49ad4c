// What jax calls: products of packed ternary matrices with activations, and attention, for CPUs.
//
// The mathematics of products is in prefixes.h. No result depends on the number of threads or on
// the width of registers.
#include <cstdint>
#include <utility>

#include "attention.h"
#include "gemm.h"
#include "gemm8.h"
#include "gemv.h"
#include "xla/ffi/api/ffi.h"

namespace {

Matrix matrix_of(ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales, int64_t rows, int64_t bases,
                 bool tied, int64_t period, int64_t length, ffi::Span<const float> taps,
                 int64_t group_size) {
  const int64_t code_rows = codes.dimensions()[0];
  const int64_t ages = length ? int64_t(taps.size()) / bases - 1 : 0;  // behind the taps: phases
  return {codes.typed_data(),
          code_rows,
          int64_t(codes.element_count()) / code_rows,
          rows,
          int(bases),
          tied,
          {period, length, ages, taps.begin(), taps.begin() + ages * bases},
          scales.untyped_data(),
          scales.element_type(),
          scales.dimensions()[0],
          scales.dimensions()[1],
          group_size,
          scales.dimensions()[2]};
}

ffi::Error call_gemv(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                     int64_t rows, int64_t bases, bool tied, int64_t period, int64_t length,
                     ffi::Span<const float> taps, int64_t group_size, ffi::Buffer<ffi::F32> x,
                     ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::F32> residual, int64_t parts,
                     float eps, bool gated, ffi::ResultBuffer<ffi::F32> y) {
  const Matrix matrix =
      matrix_of(codes, scales, rows, bases, tied, period, length, taps, group_size);
  const Around around{gain.element_count() ? gain.typed_data() : nullptr, eps,
                      residual.element_count() ? residual.typed_data() : nullptr, gated};
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  if (!parts && tokens * matrix.sums() >= kMany)
    return gemm8(pool, x.typed_data(), tokens, inputs, matrix, around, y->typed_data());
  return gemv(pool, x.typed_data(), tokens, inputs, int(parts), matrix, around, y->typed_data());
}

ffi::Error call_gemm(ffi::ThreadPool pool, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scales,
                     int64_t rows, int64_t bases, bool tied, int64_t period, int64_t length,
                     ffi::Span<const float> taps, int64_t group_size, ffi::Buffer<ffi::F32> x,
                     bool int8, ffi::ResultBuffer<ffi::F32> y) {
  const Matrix matrix =
      matrix_of(codes, scales, rows, bases, tied, period, length, taps, group_size);
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  if (int8) return gemm8(pool, x.typed_data(), tokens, inputs, matrix, {}, y->typed_data());
  return gemm(pool, x.typed_data(), tokens, inputs, matrix, y->typed_data());
}

// keys, values [batch, kv_heads, length, head_dim], and the scales of those in 8 bits, are written
// where they lie: the results are they.
ffi::Error call_attend(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> positions,
                       ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k, ffi::Buffer<ffi::F32> v,
                       ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::RemainingArgs,
                       ffi::Span<const float> frequencies, ffi::Span<const int64_t> starts,
                       int64_t heads, int64_t window, ffi::ResultBuffer<ffi::F32> out,
                       ffi::Result<ffi::AnyBuffer> new_keys,
                       ffi::Result<ffi::AnyBuffer> new_values, ffi::RemainingRets new_scales) {
  const auto sizes = keys.dimensions();
  const Heads h{sizes[0], heads, sizes[1], sizes[3], sizes[2], window, frequencies.begin()};
  auto part = [&](ffi::Buffer<ffi::F32>& x, int64_t start) {
    return Part{x.typed_data() + start, int64_t(x.element_count()) / h.batch};
  };
  auto with = [&](auto* k_cache, float* k_scales, float* v_scales) {
    auto* v_cache = static_cast<decltype(k_cache)>(new_values->untyped_data());
    using Element = std::remove_pointer_t<decltype(k_cache)>;
    attend(pool, h, part(q, starts[0]), part(k, starts[1]), part(v, starts[2]),
           positions.typed_data(), Places<Element>{k_cache, k_scales},
           Places<Element>{v_cache, v_scales}, out->typed_data());
  };
  if (keys.element_type() == ffi::S8) {
    const auto k_scales = new_scales.get<ffi::Buffer<ffi::F32>>(0);
    const auto v_scales = new_scales.get<ffi::Buffer<ffi::F32>>(1);
    if (!k_scales || !v_scales) return ffi::Error::InvalidArgument("keys in 8 bits have no scales");
    with(static_cast<int8_t*>(new_keys->untyped_data()), (*k_scales)->typed_data(),
         (*v_scales)->typed_data());
  } else {
    with_type(keys.element_type(), new_keys->untyped_data(),
              [&](auto* k_cache) { with(k_cache, nullptr, nullptr); });
  }
  return ffi::Error::Success();
}

// Binds the arguments of `matrix_of`, before others.
auto with_matrix() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::Buffer<ffi::U8>>()
      .Arg<ffi::AnyBuffer>()
      .Attr<int64_t>("rows")
      .Attr<int64_t>("bases")
      .Attr<bool>("tied")
      .Attr<int64_t>("period")
      .Attr<int64_t>("length")
      .Attr<ffi::Span<const float>>("taps")
      .Attr<int64_t>("group_size");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(atd_gemv, call_gemv,
                              with_matrix()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("parts")
                                  .Attr<float>("eps")
                                  .Attr<bool>("gated")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(atd_gemm, call_gemm,
                              with_matrix()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("int8")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(atd_attend, call_attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Attr<ffi::Span<const float>>("frequencies")
                                  .Attr<ffi::Span<const int64_t>>("starts")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets());
