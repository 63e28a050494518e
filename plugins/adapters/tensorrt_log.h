// Where faults of the TensorRT plugins are told.
#pragma once

namespace d2d::trt {

// What `setLoggerFinder` is handed while the library is loaded: an object of the host's.
void find_logger_by(void* finder) noexcept;

// An error, "dit2deploy: WHO: FAULT": to TensorRT's logger where one is known, else to stderr.
void tell(const char* who, const char* fault) noexcept;

}  // namespace d2d::trt
