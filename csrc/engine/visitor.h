// A reference to a callable that outlives the call that it is given to: what std::function is, without a copy of it.
#pragma once

#include <cstddef>
#include <memory>
#include <type_traits>

namespace gdlib {

template <class... Arguments>
class Visitor {
 public:
  Visitor() = default;
  template <class Callable, class = std::enable_if_t<!std::is_same_v<std::decay_t<Callable>, Visitor>>>
  Visitor(const Callable& callable)
      : callable_(std::addressof(callable)),
        call_([](const void* object, Arguments... arguments) { (*static_cast<const Callable*>(object))(arguments...); }) {}

  explicit operator bool() const { return call_ != nullptr; }
  void operator()(Arguments... arguments) const { call_(callable_, arguments...); }

 private:
  const void* callable_ = nullptr;
  void (*call_)(const void*, Arguments...) = nullptr;
};

}  // namespace gdlib
