"""What a network is: the layer table, building, counting, describing, the model families. Imports metadata alone."""
