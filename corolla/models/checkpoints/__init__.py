"""The files of a base model: tensors that its config.json tells of, and such as are not there."""
