"""Commands for the users of PipelineJobs, also as the kubectl plugin ``kubectl pipelinejob``."""
