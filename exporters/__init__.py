"""Exporters: an artifact to the files that one kind of runtime loads. They pack what the solver decided, and no more.

Each format is one module with

    Options                              a frozen dataclass; its fields are the format's options
    check(matrices, config, options, folder)  raises InputError for what the format cannot hold, before any work;
                                         `matrices` are those of a plan or an artifact, `config` is the config.json of
                                         `folder`, which holds the tokenizer
    export(artifact, out, options, step) fills an empty folder, calling `step` with the name of every tensor
    notes(entries, options)              sentences that the user should read after such an export

and one reader in `exporters.reading` that shares no code with it. `exporting.export` and `verification.verify` are what
others call.
"""
