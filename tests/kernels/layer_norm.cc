// LayerNorm and RMSNorm of rows of doubles, as calls of XLA.
#include <cmath>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Rows = ffi::Buffer<ffi::F64>;

static ffi::Error Normalise(Rows x, Rows scale, Rows shift, ffi::ResultBuffer<ffi::F64> y,
                            bool center) {
  const int64_t d = x.dimensions().back(), n = x.element_count() / d;
  for (int64_t i = 0; i < n; ++i) {
    const double* row = x.typed_data() + i * d;
    double mean = 0, square = 0;
    for (int64_t j = 0; center && j < d; ++j) mean += row[j] / d;
    for (int64_t j = 0; j < d; ++j) square += (row[j] - mean) * (row[j] - mean) / d;
    for (int64_t j = 0; j < d; ++j)
      y->typed_data()[i * d + j] =
          (row[j] - mean) / std::sqrt(square + 1e-6) * scale.typed_data()[j] +
          shift.typed_data()[j];
  }
  return ffi::Error::Success();
}

static ffi::Error Product(Rows x, Rows w, ffi::ResultBuffer<ffi::F64> y) {
  const int64_t n = x.dimensions()[0], k = x.dimensions()[1], m = w.dimensions()[1];
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += x.typed_data()[i * k + l] * w.typed_data()[l * m + j];
      y->typed_data()[i * m + j] = sum;
    }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(NormaliseRows, Normalise,
                              ffi::Ffi::Bind()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Ret<Rows>()
                                  .Attr<bool>("center"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(MultiplyRows, Product,
                              ffi::Ffi::Bind().Arg<Rows>().Arg<Rows>().Ret<Rows>());
