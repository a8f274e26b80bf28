"""The API of PipelineJob: its models, and the files that are made from them."""
