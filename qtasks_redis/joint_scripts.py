"""The Lua scripts of the joint composition: each changes messages and records in one step."""

from __future__ import annotations

from qtasks_redis.record_scripts import RECORDS
from qtasks_redis.scripts import QUEUES, Script

SUBMIT = Script(
    QUEUES
    + RECORDS
    + """
-- KEYS: the set of pairs; then records, pairs and queues. ARGV: where the uuid begins in a record's
-- key, then for each message: the arguments of its record (`save`), position of its queue in KEYS,
-- delay, message, and `once` if a message that has a record must not be published. Returns for each
-- 1, or the record that has the uuid already.
local answers = {}
for a = 2, #ARGV, SAVED + 4 do
  local key, m = KEYS[tonumber(ARGV[a])], a + SAVED
  local there = ARGV[m + 3] == 'once' and redis.call('GET', key)
  if not there then
    enqueue(tonumber(ARGV[m]), tonumber(ARGV[m + 1]), ARGV[m + 2])
    -- A first record replaces no other.
    if redis.call('SET', key, ARGV[a + 5], 'NX') then
      index(KEYS[tonumber(ARGV[a + 1])], ARGV[a + 2], ARGV[a + 3], string.sub(key, UUID))
    end
  end
  answers[#answers + 1] = there or 1
end
finish()
return answers
"""
)

COMPLETE = Script(
    QUEUES
    + RECORDS
    + """
-- KEYS: the set of pairs; then records, pairs and queues. ARGV: where the uuid begins in a record's
-- key, then for each completion the six arguments of its settlement (`settle`) and those of its
-- record (`save`), all empty for none. A retry is recorded only if it took effect. Returns two for
-- each: the answer of `save` and the answer of `settle`, 0 if it was not called.
local SETTLED = 6
local answers = {}
for a = 2 + SETTLED, #ARGV, SETTLED + SAVED do
  if ARGV[a] ~= '' and lift_record(a) then break end
end
for a = 2, #ARGV, SETTLED + SAVED do
  local what, record = ARGV[a + 2], a + SETTLED
  local saved, settled = 0, 0
  if what == 'retry' then settled = settle(a) end
  if ARGV[record] ~= '' and (what ~= 'retry' or settled == 1) then saved = save(record) end
  if what ~= 'retry' and what ~= '' then settled = settle(a) end
  answers[#answers + 1] = saved
  answers[#answers + 1] = settled
end
delete_settled()
finish()
return answers
"""
)
