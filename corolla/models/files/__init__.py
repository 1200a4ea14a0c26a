"""The files of models and adapters: folders, what a checkpoint lacks, adapters of peft."""
