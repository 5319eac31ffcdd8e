// A step that can be called again
// Generated from book/kernels/step.py; edit the chapter, not this file.

namespace {

struct Use {
  size_t argument, place;
  bool last;
};

struct Call {
  c10::OperatorHandle op;
  std::vector<c10::IValue> arguments;
  std::vector<Use> made;         // arguments that earlier calls make
  std::vector<int64_t> results;  // their places; -1: a tensor known before
};

// calls of operators, noted while they happen; replay() makes them again
struct Recording : torch::CustomClassHolder {
  std::vector<Call> calls;
  std::vector<Tensor> places;
  std::unordered_map<const void*, int64_t> known;  // tensor: place, or -1
  std::string refused;  // which call cannot be made again, and why
  at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
  int depth = 0;  // of calls within calls

  static thread_local Recording* current;

  void begin() {
    TORCH_CHECK(!current && calls.empty(), "recording: begun twice");
    current = this;
    handle = at::addThreadLocalCallback(
        at::RecordFunctionCallback(entered, left)
            .needsInputs(true).needsOutputs(true)
            .scopes({at::RecordScope::FUNCTION}));
  }

  std::string end() {
    TORCH_CHECK(current == this, "recording: ended, not begun");
    at::removeCallback(handle);
    current = nullptr;
    known.clear();
    std::vector<bool> later(places.size());
    for (auto call = calls.rbegin(); call != calls.rend(); ++call)
      for (auto use = call->made.rbegin(); use != call->made.rend(); ++use) {
        use->last = !later[use->place];
        later[use->place] = true;
      }
    places.assign(places.size(), Tensor());
    return refused;
  }

  static std::unique_ptr<at::ObserverContext> entered(
      const at::RecordFunction& function) {
    if (current->depth++ == 0) current->add(function);
    return nullptr;
  }

  static void left(const at::RecordFunction& function,
                   at::ObserverContext*) {
    if (--current->depth == 0) current->finish(function);
  }

  void refuse(const at::RecordFunction& function, const char* why) {
    if (refused.empty()) refused = std::string(function.name()) + why;
  }

  void add(const at::RecordFunction& function) {
    const auto name = function.operator_name();
    if (!name) refuse(function, " is no operator");
    if (!refused.empty()) return;  // nothing here will be called again
    const auto inputs = function.inputs();
    calls.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(
                         name->name.c_str(), name->overload_name.c_str()),
                     std::vector<c10::IValue>(inputs.begin(), inputs.end()),
                     {}, {}});
    Call& call = calls.back();
    for (size_t i = 0; i < inputs.size(); ++i)
      if (inputs[i].isTensor()) {
        const int64_t place = known.emplace(
            inputs[i].unsafeToTensorImpl(), -1).first->second;
        if (place < 0) continue;
        call.made.push_back({i, size_t(place), false});
        call.arguments[i] = {};
      } else if (inputs[i].isList()) {
        for (const c10::IValue& one : inputs[i].toListRef())
          if (one.isTensor()) refuse(function, " takes a list of tensors");
      }
  }

  void finish(const at::RecordFunction& function) {
    if (!refused.empty()) return;
    const auto& from = calls.back().arguments;
    const bool constant = calls.back().made.empty() && std::none_of(
        from.begin(), from.end(), [](auto& x) { return x.isTensor(); });
    for (const c10::IValue& result : function.outputs()) {
      if (!result.isTensor() && constant) return calls.pop_back();
      if (!result.isTensor()) return refuse(function, " gives no tensor");
      const auto [at, fresh] = known.emplace(
          result.unsafeToTensorImpl(), int64_t(places.size()));
      calls.back().results.push_back(fresh ? at->second : -1);
      if (fresh) places.push_back(result.toTensor());  // keeps its address
    }
  }

  void replay() {
    std::vector<c10::IValue> stack;
    for (const Call& call : calls) {
      stack.assign(call.arguments.begin(), call.arguments.end());
      for (const Use& use : call.made)
        if (use.last) stack[use.argument] = std::move(places[use.place]);
        else stack[use.argument] = places[use.place];
      call.op.callBoxed(stack);
      for (size_t i = 0; i < call.results.size(); ++i)
        if (call.results[i] >= 0)
          places[call.results[i]] = std::move(stack[i]).toTensor();
    }
  }
};

thread_local Recording* Recording::current = nullptr;

TORCH_LIBRARY_FRAGMENT(gptoss, m) {
  m.class_<Recording>("Recording")
      .def(torch::init<>())
      .def("begin", &Recording::begin)
      .def("end", &Recording::end)
      .def("replay", &Recording::replay);
}

}  // namespace
