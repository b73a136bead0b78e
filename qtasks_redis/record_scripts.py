"""The Lua scripts for records and for the other data that processes share.

A record is one key. Lists of records need more, and every script that changes a record changes
these with it:

    index:PAIR:CLASS          a group, a sorted set: uuid -> `created_at`
    index:PAIR:CLASS:expires  a sorted set: uuids of final records -> the time at which they expire
    pairs                     a set of all `index:PAIR`

and one key tells that a push to watchers is worth its time:

    watched                   exists while any inbox watches tasks of other clients

PAIR is a queue and the name of a task. CLASS is a status, or `dead` for a dead letter. So each
record is in one group, and every filter selects whole groups. When a record expires by its TTL,
its rows stay until a reader finds them or `expire` removes them.
"""

from __future__ import annotations

from qtasks_core.records import FIRST_BEGUN, FIRST_FINAL, RANKS
from qtasks_redis.scripts import FIRST, Script

CLOCK = """
local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""
RECORDS = (
    f"{CLOCK}local RANKS, FIRST_BEGUN, FIRST_FINAL = {RANKS}, {FIRST_BEGUN}, {FIRST_FINAL}"
    """
local PAIRS = KEYS[1]
local CLASSES = {'new', 'scheduled', 'process', 'retry', 'success', 'error', 'cancel'}

local function rank(order)
  return tonumber(order) % RANKS
end

-- Remove rows of this class from all pairs: these records had another queue or another name.
local function remove_elsewhere(class, uuids)
  for _, pair in ipairs(redis.call('SMEMBERS', PAIRS)) do
    redis.call('ZREM', pair .. ':' .. class, unpack(uuids))
  end
end
"""
)
SAVING = (
    RECORDS
    + FIRST
    + """
-- What the caller sent, packed into one argument: many arguments take the server and the driver
-- much longer. It begins with the start of a record's key, those of the channels of watchers and of
-- inboxes, and the key that exists while there are watchers. Records are arguments of their own.
local sent = cmsgpack.unpack(ARGV[1])
local RECORD, FINAL, INBOX, WATCHED = sent[1], sent[2], sent[3], sent[4]
local ITEMS = 5  -- where the rest begins
local SAVED = 6  -- what is sent of one record
local SMALL = 65536
local OVER = 'over'  -- instead of the tenths of a second, if the time has passed already
local boxes, added, removed, ending = {}, {}, {}, {}

local function list(lists, key)
  local found = lists[key]
  if not found then
    found = {}
    lists[key] = found
  end
  return found
end

local function send(channel, box)
  -- A push that is refused fails no record.
  redis.pcall('PUBLISH', channel, table.concat(box))
end

local function push(channel, item)
  local box = boxes[channel]
  if not box then
    box = {size = 0}
    boxes[channel] = box
  end
  if box.size > 262144 then
    send(channel, box)
    box = {size = 0}
    boxes[channel] = box
  end
  box[#box + 1] = item
  box.size = box.size + #item
end

local watched
local function push_final(key, uuid, value, inbox)
  if watched == nil then watched = redis.call('EXISTS', WATCHED) == 1 end
  if inbox == '' and not watched then return end
  -- A large record is only named, so that the server need not hold it for each listener.
  local body = '=' .. key
  if #value <= SMALL then body = string.sub(value, 14 + string.sub(value, 11, 13)) end
  local item = struct.pack('>I4', #body) .. body
  if inbox ~= '' then push(INBOX .. inbox, item) end
  if watched then redis.pcall('PUBLISH', FINAL .. uuid, item) end
end

-- On a full server a small record of a task that has begun is taken all the same, or no task could
-- end: after a first write, which changes nothing here, a script may use memory.
local function lift_record(key, value)
  if #value > SMALL or rank(string.sub(value, 1, 10)) < FIRST_BEGUN then return false end
  if redis.call('PTTL', key) >= 0 then return false end
  redis.call('PERSIST', key)
  return true
end

local function index(group, created, uuid)
  local rows = list(added, group)
  rows[#rows + 1] = created
  rows[#rows + 1] = uuid
end

-- Save a record. What is sent of it begins at sent[a]: uuid, the position of its group in KEYS,
-- `created_at`, the rank of its status, and for a final record the milliseconds to keep it ('' for
-- ever) and the address of its inbox ('' for none). `value` is its head and the record. The head is
-- ten digits of order, three of length, and the execution. Returns 1 (done), or what is there
-- instead. No uuid may come twice in one call of a script.
local function save(a, value)
  local uuid, begun = sent[a], sent[a + 3] >= FIRST_BEGUN
  local key = RECORD .. uuid
  local there = redis.call('GETRANGE', key, '0', '9')
  local stored = FIRST[there]
  if there ~= '' and not (stored and begun) then
    local length = 13 + tonumber(string.sub(value, 11, 13))
    local head = string.sub(value, 1, length)
    if redis.call('GETRANGE', key, 0, length - 1) == head then return 1 end
    local order, stored_order = tonumber(string.sub(head, 1, 10)), tonumber(there)
    stored = stored_order % RANKS
    if stored >= FIRST_FINAL or order < stored_order or not begun then
      return redis.call('GET', key)
    end
  end
  local group, keep = KEYS[sent[a + 1]], sent[a + 4]
  if keep == '' then
    redis.call('SET', key, value)
  else
    redis.call('SET', key, value, 'PX', keep)
    -- Records that expire within one tenth of a second have one row.
    local uuids = list(list(ending, group), keep == '1' and OVER or string.sub(keep, 1, -3))
    uuids[#uuids + 1] = uuid
  end
  if stored and stored ~= sent[a + 3] then
    local rows = list(list(removed, group), stored)
    rows[#rows + 1] = uuid
  elseif stored and not redis.call('ZSCORE', group, uuid) then
    remove_elsewhere(CLASSES[stored + 1], {uuid})
  end
  index(group, sent[a + 2], uuid)
  if sent[a + 3] >= FIRST_FINAL then
    push_final(key, uuid, value, sent[a + 5])
  end
  return 1
end

-- Write the rows of all saved records, and send their pushes. Each set is changed once.
local function finish()
  for group, ranks in pairs(removed) do
    for old, uuids in pairs(ranks) do
      local class = CLASSES[old + 1]
      local was = string.gsub(group, '%l+$', class)
      if redis.call('ZREM', was, unpack(uuids)) < #uuids then remove_elsewhere(class, uuids) end
    end
  end
  for group, rows in pairs(added) do
    redis.call('ZADD', group, unpack(rows))
    redis.call('SADD', PAIRS, string.match(group, '^(.*):'))
  end
  local now = next(ending) and clock()
  for group, times in pairs(ending) do
    for tenths, uuids in pairs(times) do
      local over = now + (tenths == OVER and 0 or 100 + 100 * (tonumber(tenths) or 0))
      redis.call('ZADD', group .. ':expires', over, table.concat(uuids, '\\0'))
    end
  end
  for channel, box in pairs(boxes) do send(channel, box) end
end
"""
)

SAVE = Script(
    SAVING
    + """
-- KEYS: the set of pairs, the groups of the records. ARGV: what is sent (`save`), the records.
-- Returns the answers of `save`.
local answers = {}
for i = 2, #ARGV do
  if lift_record(RECORD .. sent[(i - 2) * SAVED + ITEMS], ARGV[i]) then break end
end
for i = 2, #ARGV do answers[i - 1] = save((i - 2) * SAVED + ITEMS, ARGV[i]) end
finish()
return answers
"""
)

WATCH = Script(
    """
-- KEYS: the key that tells of watchers. ARGV: for how many milliseconds. Returns whether there were
-- any. After a first write that changes nothing, a full server takes the other.
local there = redis.call('EXISTS', KEYS[1])
redis.call('PERSIST', KEYS[1])
redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
return there
"""
)

LIST = Script(
    f"local RANKS = {RANKS}"
    """
-- KEYS: groups, the sorted sets of records. ARGV: the start of a record's key, how many rows at
-- most, `created_before`, `created_after`, then score and uuid of the cursor ('' for none), and the
-- rank of each group. Returns: 1 if there may be more, score and uuid of the last row that was
-- looked at, and three for each row: its group's number, score, uuid. Newest first.
local records, most = ARGV[1], tonumber(ARGV[2])
local before, after, score, uuid = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local LOOKED_AT = 2000

-- Lua compares text by the server's locale, sorted sets compare bytes.
local function less(a, b)
  if a == b then return false end
  local at = 1
  while true do
    local one, other = string.byte(a, at), string.byte(b, at)
    if one ~= other then return (one or -1) < (other or -1) end
    at = at + 1
  end
end

-- The number of rows that come before the cursor and the cursor itself.
local function passed(group)
  local first = redis.call('ZCOUNT', group, '(' .. score, '+inf')
  local low, high = first, first + redis.call('ZCOUNT', group, score, score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    if less(redis.call('ZREVRANGE', group, middle, middle)[1], uuid) then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

local groups = {}
local page = math.max(math.ceil(most / #KEYS), 8)

-- Look at the next row of a group. A group without more rows has no `uuid`.
local function step(group)
  group.at = group.at + 2
  if group.at > #group.rows then
    local last = math.min(group.next + page, group.stop) - 1
    group.rows, group.at = {}, 1
    if last >= group.next then
      group.rows = redis.call('ZREVRANGE', group.key, group.next, last, 'WITHSCORES')
      group.next = last + 1
    end
  end
  group.uuid, group.score = group.rows[group.at], tonumber(group.rows[group.at + 1])
end

for i, key in ipairs(KEYS) do
  local start, stop = 0, nil
  if before ~= '' then start = redis.call('ZCOUNT', key, before, '+inf') end
  if score ~= '' then start = math.max(start, passed(key)) end
  if after ~= '' then
    stop = redis.call('ZCOUNT', key, after, '+inf')
  else
    stop = redis.call('ZCARD', key)
  end
  local group = {key = key, number = i - 1, rows = {}, at = 1, next = start, stop = stop}
  step(group)
  if group.uuid then groups[#groups + 1] = group end
end

local answer, looked, gone = {0, '', ''}, 0, {}
local found = 0
while true do
  local newest
  for _, group in ipairs(groups) do
    if group.uuid and (
      not newest or group.score > newest.score
      or group.score == newest.score and less(newest.uuid, group.uuid)
    ) then
      newest = group
    end
  end
  if not newest then break end
  if found == most or looked == LOOKED_AT then
    answer[1] = 1
    break
  end
  looked = looked + 1
  answer[2], answer[3] = newest.rows[newest.at + 1], newest.uuid
  local order = tonumber(redis.call('GETRANGE', records .. newest.uuid, 0, 9))
  if order and order % RANKS == tonumber(ARGV[7 + newest.number]) then
    found = found + 1
    local n = #answer
    answer[n + 1], answer[n + 2], answer[n + 3] = newest.number, answer[2], newest.uuid
  else
    gone[#gone + 1] = {newest.key, newest.uuid}
  end
  step(newest)
end
-- Only now: a row that is removed shifts those behind it.
for _, row in ipairs(gone) do redis.call('ZREM', row[1], row[2]) end
return answer
"""
)

DELETE = Script(
    RECORDS
    + """
-- KEYS: the set of pairs, the index of streams, then two a record: record, stream; then the groups.
-- ARGV: where the uuid begins in a record's key, and three for each record: its head as the caller
-- read it, the position of its group in KEYS (0 if it is unknown), its class.
-- Returns for each 1 (deleted), 0 (there is none), or 2 (it is no longer as the caller read it).
local answers = {}
for i = 1, (#ARGV - 1) / 3 do
  local key, items = KEYS[i * 2 + 1], KEYS[i * 2 + 2]
  local head, group, class = ARGV[i * 3 - 1], KEYS[tonumber(ARGV[i * 3])], ARGV[i * 3 + 1]
  local uuid = string.sub(key, ARGV[1])
  local there = redis.call('GETRANGE', key, 0, math.max(#head, 1) - 1)
  if there ~= head then
    answers[i] = 2
  else
    if head == '' then
      answers[i] = 0
    elseif group then
      redis.call('ZREM', group, uuid)
    else
      remove_elsewhere(class, {uuid})
      if class == 'error' then remove_elsewhere('dead', {uuid}) end
    end
    answers[i] = answers[i] or redis.call('DEL', key)
    redis.call('DEL', items)
    redis.call('ZREM', KEYS[2], uuid)
  end
end
return answers
"""
)

EXPIRE = Script(
    RECORDS
    + """
-- KEYS: the set of pairs, the index of streams, the pairs. ARGV: the starts of a record's and of a
-- stream's key, and how many records at most. Returns how many have expired, and how many fewer
-- than that were looked at.
local records, streams, left = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now, count = clock(), 0

local function expire_one(group, class_rank, uuid)
  local key = records .. uuid
  local ttl = redis.call('PTTL', key)
  local gone = ttl == -2
  if ttl >= 0 and ttl <= 5 then
    -- The record's own time: the server deletes it by itself some moments later.
    redis.call('DEL', key)
    gone = true
  end
  if gone then
    redis.call('DEL', streams .. uuid)
    redis.call('ZREM', KEYS[2], uuid)
    count = count + redis.call('ZREM', group, uuid)
  elseif rank(redis.call('GETRANGE', key, 0, 9)) ~= class_rank then
    -- The uuid has a new record, in another group.
    redis.call('ZREM', group, uuid)
  end
end

local function expire(group, class_rank)
  local expires = group .. ':expires'
  while left > 0 do
    local row = redis.call('ZRANGEBYSCORE', expires, '-inf', now, 'LIMIT', 0, 1)[1]
    if not row then break end
    for uuid in string.gmatch(row, '[^%z]+') do
      expire_one(group, class_rank, uuid)
      left = left - 1
    end
    redis.call('ZREM', expires, row)
  end
  return redis.call('EXISTS', group, expires) == 0
end

for at = 3, #KEYS do
  local pair = KEYS[at]
  local empty = expire(pair .. ':dead', 5)
  for place, class in ipairs(CLASSES) do
    if not expire(pair .. ':' .. class, place - 1) then empty = false end
  end
  if empty then redis.call('SREM', PAIRS, pair) end
end
return {count, math.max(left, 0)}
"""
)

APPEND = Script(
    CLOCK
    + """
-- KEYS: the stream, the index of streams. ARGV: uuid, items.
for at = 2, #ARGV, 5000 do
  redis.call('RPUSH', KEYS[1], unpack(ARGV, at, math.min(at + 4999, #ARGV)))
end
redis.call('ZADD', KEYS[2], clock(), ARGV[1])
"""
)

TIDY = Script(
    CLOCK
    + """
-- KEYS: the index of streams. ARGV: the starts of a record's and of a stream's key, the
-- milliseconds that a stream without a record is kept, and how many streams at most. Returns how
-- many it looked at.
local old = redis.call(
  'ZRANGEBYSCORE', KEYS[1], '-inf', clock() - ARGV[3], 'LIMIT', 0, ARGV[4]
)
for _, uuid in ipairs(old) do
  -- The stream of a record is deleted with the record.
  if redis.call('EXISTS', ARGV[1] .. uuid) == 0 then redis.call('DEL', ARGV[2] .. uuid) end
  redis.call('ZREM', KEYS[1], uuid)
end
return #old
"""
)

CLAIM = Script(
    """
-- KEYS: the claim. ARGV: owner, milliseconds. Returns the time at which the claim is over, in
-- seconds, or nothing if another owner has it.
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return false end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local time = redis.call('TIME')
return string.format('%.3f', time[1] + time[2] / 1000000 + ARGV[2] / 1000)
"""
)

RELEASE = Script(
    """
-- KEYS: the claim. ARGV: owner.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
)

SET_VALUE = Script(
    """
-- KEYS: the values, the index of their names. ARGV: name, `any`, `none` or `is` and the expected
-- value, `delete` or `set` and the value, the channel of the watchers. Returns 1 or 0.
local name, expecting, expected, change, value = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local there = redis.call('HGET', KEYS[1], name)
if expecting == 'none' and there or expecting == 'is' and there ~= expected then return 0 end
if change == 'set' then
  if there == value then return 1 end
  redis.call('HSET', KEYS[1], name, value)
  redis.call('ZADD', KEYS[2], 0, name)
else
  if not there then return 1 end
  redis.call('HDEL', KEYS[1], name)
  redis.call('ZREM', KEYS[2], name)
end
redis.pcall('PUBLISH', ARGV[6], '')
return 1
"""
)

VALUES = Script(
    """
-- KEYS: the values, the index of their names. ARGV: a prefix. Returns names and values in turns.
local found = {}
local names = redis.call('ZRANGEBYLEX', KEYS[2], '[' .. ARGV[1], '(' .. ARGV[1] .. '\\255')
for at = 1, #names, 1000 do
  local last = math.min(at + 999, #names)
  for i, value in ipairs(redis.call('HMGET', KEYS[1], unpack(names, at, last))) do
    found[#found + 1] = names[at + i - 1]
    found[#found + 1] = value
  end
end
return found
"""
)
