"""`conformance plan`: what a step costs for a model on a mesh, without the hardware."""
