"""The suite that holds an implementation of an orthonormal optimizer to the float64 oracle."""
