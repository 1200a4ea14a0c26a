// Whether this device computes the sign stream as all others do.
#pragma once

namespace corolla {

// Known answers of the stream, and a replay of three rounds. Throws Error naming the first that
// differs: such a device must not take part.
void check_signs();

}  // namespace corolla
