"""The Lua scripts of the joint composition: each changes messages and records in one step."""

from __future__ import annotations

from qtasks_redis.record_scripts import RECORDS
from qtasks_redis.scripts import QUEUES, Script

SUBMIT = Script(
    QUEUES
    + RECORDS
    + """
-- KEYS: the set of pairs, the records, their groups and the queues. ARGV: where the uuid begins in
-- a record's key, the start of the watchers' channels, and for each message: the arguments of its
-- record (`save`), position of its queue in KEYS, delay, message, and `once` if a message that has
-- a record must not be published. Returns for each 1, or the record that has the uuid already.
local answers = {}
for i = 1, (#ARGV - 2) / (SAVED + 4) do
  local key, a = KEYS[i + 1], (i - 1) * (SAVED + 4) + 3
  local m = a + SAVED
  local there = ARGV[m + 3] == 'once' and redis.call('GET', key)
  if not there then
    enqueue(tonumber(ARGV[m]), tonumber(ARGV[m + 1]), ARGV[m + 2])
    -- A first record replaces no other.
    if redis.call('SET', key, ARGV[a + 3], 'NX') then
      index(KEYS[tonumber(ARGV[a])], ARGV[a + 1], string.sub(key, UUID))
    end
  end
  answers[i] = there or 1
end
finish()
return answers
"""
)

COMPLETE = Script(
    QUEUES
    + RECORDS
    + """
-- KEYS: the set of pairs, the records, their groups and the queues. ARGV: where the uuid begins in
-- a record's key, the start of the watchers' channels, and for each completion: the number of
-- arguments of its settlement, 1 if it has a record, then the arguments of both (`settle`, `save`).
-- A retry is recorded only if it took effect. Returns two for each: the answer of `save` and the
-- answer of `settle`, 0 if it was not called.
local answers, lifted_record = {}, false
local a, next_record = 3, 2
while a <= #ARGV do
  local length, has_record, s = tonumber(ARGV[a]), ARGV[a + 1] == '1', a + 2
  local record, what = s + length, length > 0 and ARGV[s + 2]
  local saved, settled = 0, 0
  local key
  if has_record then
    key = KEYS[next_record]
    next_record = next_record + 1
    lifted_record = lifted_record or lift_record(key, record)
  end
  if what == 'retry' then settled = settle(s) end
  if has_record and (what ~= 'retry' or settled == 1) then saved = save(key, record) end
  if what and what ~= 'retry' then settled = settle(s) end
  answers[#answers + 1] = saved
  answers[#answers + 1] = settled
  a = record + (has_record and SAVED or 0)
end
delete_settled()
finish()
return answers
"""
)
