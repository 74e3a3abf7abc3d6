"""From the user's files to batches. The words of this room, one for each thing, in the order in which data passes:

* A **record** is what a file holds for one training sample: a JSON object or a row. A `RawRecord` is a record as it was
  read, a `Record` one that was parsed; both know their file and line (`sources`).
* A **format** says what the fields of a record mean and turns it into an example (`formats`, `fields`, `conversations`,
  `token_fields`, with the help of `text`: tokenizers, prompt templates, chat templates).
* An **example** is the token ids and labels of one record (`example`).
* A **dataset** is a sequence of examples: tokenized ahead and held in arrays, several of these as one, or a stream that
  is tokenized while training (`dataset`, `streaming`). `build` makes it from the [data] section; `tokens` tokenizes
  many records at once and keeps the result on disk.
* A **sample** is what one place in the global batch trains on: one example or a pack of them. `order` says which
  examples make up the sample at each position of the run.
* A **batch** is the samples of one micro-batch as tensors (`loader`).
"""
