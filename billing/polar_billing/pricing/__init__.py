"""What a price book is made of, and what can be asked of one without any usage.

* `fields`    prices, multipliers and moments, checked
* `plans`     plans of customers: fees, bands, packages, minimums, discounts, promises, prepaid credits
* `bands`     graduated and volume bands and packages, as integer arithmetic
* `timeline`  what one revision of a book changes, and what of that lies in the past
* `bound`     `quote`: the most a request can cost, before it runs

The book itself is `polar_billing.price_book`. Nothing here knows a usage record or a database.
"""
