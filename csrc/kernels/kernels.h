// The contract between the engine and the ground floor: every kernel's shapes, layout and aliasing.
//
// A kernel is pure arithmetic on pointers and sizes: no allocation, no threads, no exceptions. Matrices are row-major; a `stride` counts
// elements between the starts of two rows. Inputs are `const` and may be read-only memory. An output never overlaps an input unless its
// line says "in place". No pointer needs more than the alignment of its element type.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace gdlib {

// Below this, a vector of outputs would be mostly empty: rows are folded by kernels of their own instead of products of panels.
constexpr size_t few_outputs = 8;

// Hyperparameters of one stochastic-gradient-descent update, with PyTorch's meaning.
template <class T>
struct SgdOptions {
  T lr;
  T momentum;
  T dampening;
  T weight_decay;
  bool nesterov;
  bool maximize;
};

// PyTorch's SGD step on a block of parameters: see KernelTable::sgd_update.
template <class T>
struct SgdUpdate {
  size_t rows;
  size_t cols;
  SgdOptions<T> options;
  T gradient_scale;        // the gradient is multiplied by it first
  bool first_step;         // the momentum buffer is set to the gradient instead of being decayed
  const T* gradient;       // [rows, cols], rows gradient_stride apart
  size_t gradient_stride;
  T* parameter;            // [rows, cols], rows `stride` apart, in place
  T* momentum;             // the same, or null without momentum
  size_t stride;
};

// A visit to `rows` rows, at least one, of a linear layer with few outputs and a squared-error loss: see KernelTable::linear_step.
template <class T>
struct LinearStep {
  const T* x;             // [*, in_features], rows `x_stride` apart
  size_t x_stride;
  const uint32_t* index;  // [rows] row numbers into x and target, or null: rows 0, 1, 2, ...
  size_t rows;
  size_t next;            // of the rows that may be read after these, the first, numbered like them: `rows` or a later one
  size_t rows_ahead;      // how many these are
  bool prefetch;          // x is larger than a core's caches: see to it that the next rows are fetched while these are in work
  bool from_memory;       // and than the one that cores share
  bool by_requests;       // rows in order are asked for too, and with vectors of a line long ones are read by whole lines
  size_t in_features;
  size_t out_features;
  const T* weight;        // [out_features, in_features]
  const T* bias;          // [out_features], or null
  const T* target;        // [*, out_features] dense, or null: a target of zero
  T* weight_gradient;     // [out_features, in_features], overwritten
  T* bias_gradient;       // [out_features], overwritten; null when bias is
};

// Steps of mini-batch SGD on a linear layer with one output and a squared-error loss: see KernelTable::linear_run.
template <class T>
struct LinearRun {
  const T* x;             // [*, in_features], rows `x_stride` apart
  size_t x_stride;
  const T* target;        // [*]
  const T* extended;      // what extend_rows made of x and target, read in their place; or null
  const uint32_t* index;  // [rows] row numbers into x and target, or null: rows 0, 1, 2, ...
  size_t rows;            // of all steps; the last batch may be smaller
  size_t rows_ahead;      // rows after these that may be read next
  bool by_requests;       // rows in order are asked for ahead, unless they are extended
  size_t batch_size;
  size_t in_features;
  bool has_bias;
  bool mean;              // the loss is the mean over a batch, else the sum
  SgdOptions<T> options;
  bool first_step;        // the momentum buffer is not set yet
  T* parameters;          // [in_features + has_bias], in place
  T* momentum;            // the same, or null without momentum
  double* loss;           // the sums of squared errors are added
};

// Of an extended row (see KernelTable::extend_rows): features, 1 where there is a bias, target. Static, as code for one ISA must not serve
// the others.
static constexpr size_t extended_vectors(size_t in_features, bool has_bias, size_t lanes) {
  return (in_features + has_bias + 1 + lanes - 1) / lanes;
}

// Keys of one pseudo-random order: a bijection of the numbers below 2^bits.
struct ShuffleKeys {
  static constexpr int rounds = 5;
  uint32_t multiplier[rounds];  // odd
  uint32_t addend[rounds];
  uint32_t mask;                // 2^bits - 1
  uint32_t shift;               // ceil(bits / 2)
};

// One register tile of a product, or whole rows of one: see KernelTable::gemm_tile and gemm_rows.
template <class T>
struct GemmTile {
  size_t depth;
  const T* a;              // [rows, depth], elements a_row_stride and a_depth_stride apart
  size_t a_row_stride;
  size_t a_depth_stride;
  const T* b;              // [depth, columns], rows b_stride apart; gemm_tile reads whole vectors, past the last column too
  size_t b_stride;
  bool b_in_cache;         // gemm_transposed: all of b is probably in a cache
  const T* start;          // [rows, columns], rows start_stride apart (0: one row for all), or null: zeros; may be c
  size_t start_stride;
  T* c;                    // [rows, columns], rows c_stride apart
  size_t c_stride;
  size_t columns;
  const T* fetch;          // about as many rows and columns, fetch_stride apart, that are written next: asked for meanwhile; or null
  size_t fetch_stride;
};

constexpr size_t most_tile_rows = 8;
constexpr size_t most_tile_vectors = 3;

// A block of rows, `stride` elements apart.
template <class T>
struct Strided {
  T* data;
  size_t stride;
};

// What may follow a linear layer; none: nothing does.
enum class Activation { none, relu, tanh, sigmoid };

template <class T>
struct KernelTable {
  // GEMM. c = start + a b on a tile of r rows and v vectors of columns (the last one whole or in part) by gemm_tile[r - 1][v - 1], for r up
  // to tile_rows and v up to tile_vectors. Every element is one chain of multiply-adds in the order of depth, from its start on: how a
  // product is cut into tiles, blocks of depth and threads does not show in its bits.
  size_t tile_rows;
  size_t tile_vectors;
  size_t lanes;  // elements of a vector
  void (*gemm_tile[most_tile_rows][most_tile_vectors])(const GemmTile<T>& tile);

  // The same for few rows, r of them by gemm_transposed[r - 1] for r up to transposed_rows, and any columns of b, each a sequence of
  // `depth` elements, b_stride apart.
  size_t transposed_rows;
  void (*gemm_transposed[most_tile_rows])(const GemmTile<T>& tile);

  // The same for any rows and any columns of a b of which nothing is read past the last column.
  void (*gemm_rows)(size_t rows, const GemmTile<T>& tile);

  // panel[depth][panel_width] = the elements (d, k) of a source with the given strides, one of which is 1, for k < width, and zeros from
  // there on. Columns of b: panel_width is a multiple of `lanes`. Rows of a: it is tile_rows, and the stride of k is 1.
  void (*gemm_pack_columns)(size_t depth, size_t width, const T* source, size_t depth_stride, size_t width_stride, T* panel,
                            size_t panel_width);
  void (*gemm_pack_rows)(size_t depth, size_t width, const T* source, size_t depth_stride, T* panel);

  // y[rows, out] = x[rows, in] weight[out, in]^T + bias[out], for few outputs. A row's value does not depend on the other rows.
  // `from_memory`: x comes from beyond the caches; `by_requests`: then its rows are asked for ahead, however long they are.
  void (*linear_forward)(size_t rows, size_t in_features, size_t out_features, const T* x, size_t x_stride, const T* weight,
                         const T* bias, T* y, bool from_memory, bool by_requests);

  // weight_gradient[out, in] += g[rows, out]^T x[rows, in]; bias_gradient[out] += column sums of g (null: skipped). For few outputs.
  // `by_requests`: rows of less than a page are asked for ahead.
  void (*linear_gradient)(size_t rows, size_t in_features, size_t out_features, const T* g, const T* x, size_t x_stride,
                          T* weight_gradient, T* bias_gradient, bool by_requests);

  // input_gradient[rows, in] = g[rows, out] weight[out, in], for few outputs, at least one.
  void (*linear_input_gradient)(size_t rows, size_t in_features, size_t out_features, const T* g, const T* weight, T* input_gradient);

  // sums[cols] += column sums of g[rows, cols], in the order of rows, which are g_stride apart.
  void (*column_sums)(size_t rows, size_t cols, const T* g, size_t g_stride, T* sums);

  // One pass over the rows: residual r = x weight^T + bias - target; gradient of sum r^2, that is 2 r^T x and 2 sum r; returns sum r^2.
  double (*linear_step)(const LinearStep<T>& step);

  // Two such passes at once, which differ in x, target, rows and gradients alone; losses[2] are theirs. Bit by bit as one after the other,
  // and faster where gain_together says so; elsewhere not to be called.
  bool (*gain_together)(const LinearStep<T>& step);
  void (*linear_steps)(const LinearStep<T>* steps, double* losses);

  // The steps of a run, for up to run_features features; returns how many were made: it stops before one whose loss is not finite.
  size_t run_features;
  size_t (*linear_run)(const LinearRun<T>& run);

  // extended[rows][extended_vectors] = (features, 1 if there is a bias, target, zeros) of the rows of a run, whose index is left aside. The
  // steps of a run that is given them have the same bits.
  void (*extend_rows)(const LinearRun<T>& run, T* extended);

  // Squared error over n elements: the sum; each term; scale * the gradient with respect to the output, scale * 2 (output - target),
  // where `gradient` may be the output.
  //
  // Here and below, `nontemporal` results bypass the caches: for an output of its own that they could not keep.
  double (*squared_error_sum)(size_t n, const T* output, const T* target);
  void (*squared_error_terms)(size_t n, const T* output, const T* target, T* terms);
  void (*squared_error_gradient)(size_t n, const T* output, const T* target, T scale, T* gradient, bool nontemporal);

  // y[rows, cols] = the activation of x, which y may be (none: nothing is written); an element's bits depend on its value alone.
  void (*activation_forward)(Activation kind, size_t rows, size_t cols, Strided<const T> x, Strided<T> y, bool nontemporal);

  // into[rows, cols] = g times the activation's derivative where its output is y; into may be g (none: nothing is written).
  void (*activation_backward)(Activation kind, size_t rows, size_t cols, Strided<const T> y, Strided<const T> g, Strided<T> into,
                              bool nontemporal);

  // Returns whether every updated parameter is finite.
  bool (*sgd_update)(const SgdUpdate<T>& update);

  // True when no element is NaN or infinite.
  bool (*all_finite)(size_t n, const T* x);

  // mean[n] = the mean of sources[count, n], rows `stride` apart, added in their order. mean may be one of them.
  void (*average)(size_t n, size_t count, const T* sources, size_t stride, T* mean);
};

struct Kernels {
  const char* isa;   // the name that GDLIB_ISA takes
  size_t lane_bytes; // width of one vector register
  KernelTable<float> f32;
  KernelTable<double> f64;

  // Appends to `order`, in sequence, the values below `rows` that the bijection takes at first, first + 1, ..., first + count - 1;
  // returns how many. `count` is a multiple of 16; `order` has room for 16 more than it will hold.
  size_t (*shuffle)(const ShuffleKeys& keys, uint32_t first, uint32_t count, uint32_t rows, uint32_t* order);
};

}  // namespace gdlib
